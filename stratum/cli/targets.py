import click


@click.command()
def targets() -> None:
    """x"""
