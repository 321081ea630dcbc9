"""The command line that the training scripts share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.errors import UserError

ConfigFile = Annotated[Path, typer.Option(help="YAML file, see training/configs.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value changes, as optim.steps=2000.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read all data, one step, one save, then stop.")
]


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Inside the context a user's mistake is one line on stderr, and exit code 2."""
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
