"""`compile-model inspect`: what a checkpoint or an artifact holds."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stratum.cli.errors import EXIT_FAULT


@click.command()
@click.argument("path", metavar="DIR|OUT", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor of a checkpoint.")
@click.option("--verify", is_flag=True, help="Hash the weights of an artifact, whatever their size.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: Path, tensors: bool, verify: bool, as_json: bool) -> int:
    """Show what is in a Hugging Face directory or in a built artifact; weights are not read."""
    from runtime.artifact import is_artifact
    from stratum import checkpoint_report as report

    if is_artifact(path):
        facts = report.describe_artifact(path, verify=verify)
        text = report.artifact_text(facts)
    else:
        facts = report.describe_checkpoint(path)
        text = report.checkpoint_text(facts, tensors=tensors)
    click.echo(json.dumps(facts, indent=1, ensure_ascii=False) if as_json else text)
    if fault := facts.get("fault"):
        click.echo(fault, err=True)
    return EXIT_FAULT if fault else 0
