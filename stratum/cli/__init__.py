"""The `compile-model` command: one file a verb, and one place where faults become exit codes.

Verbs import what they need inside their functions, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import sys

import click

from stratum.cli.batch import batch
from stratum.cli.bench import bench
from stratum.cli.build import build
from stratum.cli.errors import guarded
from stratum.cli.eval import evaluate
from stratum.cli.inspect import inspect
from stratum.cli.opt import opt
from stratum.cli.plan import plan
from stratum.cli.quantize import quantize
from stratum.cli.recipes import recipes
from stratum.cli.routing import routing
from stratum.cli.run import run
from stratum.cli.targets import targets
from stratum.version import __version__

EPILOG = (
    "Exit codes: 0 done, 2 a fault that you can mend (one diagnostic on stderr), 3 nothing fits, 70 a bug of ours "
    "(STRATUM_TRACEBACK=1 shows the traceback), 130 interrupted."
)


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="compile-model")
def cli() -> None:
    """Compile a language model's checkpoint to native code, and run it."""


for command in (build, run, batch, plan, inspect, opt, bench, evaluate, quantize, targets, recipes, routing):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; `arguments` default to those of the process. Returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    return guarded(
        lambda: cli.main(arguments, prog_name="compile-model", standalone_mode=False), as_json="--json" in given
    )


__all__ = ["cli", "main"]
