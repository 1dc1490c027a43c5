"""`compile-model recipes`: the number formats that --recipe can name."""

from __future__ import annotations

from pathlib import Path

import click


@click.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List and show recipes of number formats."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_recipes)


@recipes.command("list")
def list_recipes() -> None:
    """The names that --recipe takes; several by commas, later ones override."""
    from passes.quantize.recipe import shipped_recipes

    for name, recipe in shipped_recipes().items():
        click.echo(f"{name:<12} {recipe.description}")


@recipes.command("show")
@click.argument("names", metavar="NAME[,NAME...]|FILE")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write it there instead.")
def show_recipe(names: str, output: Path | None) -> None:
    """The text of recipes, several joined to one: a file to change and give to --recipe."""
    from ir.diagnostics import DiagnosticError
    from passes.quantize.recipe import load_recipe

    text = load_recipe(names).to_toml()
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DiagnosticError(f"the recipe cannot be written: {error.strerror}", where=str(output)) from error
