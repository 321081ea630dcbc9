"""`latentdiff generate | edit | inpaint | ilvr | swap | enlarge | ...`: the pipeline from a shell.

Nothing heavy is imported before a command needs it, so `--help` answers at once. A user's mistake
is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import errno
import gc
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from latentdiff.cli.compile import compile_model
from latentdiff.cli.convert import convert
from latentdiff.cli.data import compose, emoji, shard
from latentdiff.cli.edit import edit, ilvr, inpaint
from latentdiff.cli.enlarge import enlarge
from latentdiff.cli.generate import generate
from latentdiff.cli.grid import grid
from latentdiff.cli.info import info
from latentdiff.cli.interpolate import interpolate
from latentdiff.cli.serve import serve
from latentdiff.cli.show import show
from latentdiff.cli.solvers import solvers
from latentdiff.cli.swap import swap
from latentdiff.cli.train import AS_THEY_ARE, autoencoder, diffusion, distill, finetune
from latentdiff.cli.words import words
from latentdiff.errors import UserError, shown
from latentdiff.memory import keep_freed_memory, wait_passively
from latentdiff.version import __version__

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(edit)
app.command()(inpaint)
app.command()(ilvr)
app.command()(swap)
app.command()(enlarge)
app.command()(interpolate)
app.command()(grid)
app.command()(convert)
app.command("compile")(compile_model)
app.command()(info)
app.command()(show)
app.command()(solvers)
app.command()(words)
app.command()(serve)
data = typer.Typer(help="Build folders of captioned pictures to train on.")
data.command()(emoji)
data.command()(compose)
data.command()(shard)
app.add_typer(data, name="data")
app.command(context_settings=AS_THEY_ARE)(finetune)
train = typer.Typer(help="Train a model of your own, in two stages, or distil one into few steps.")
train.command(context_settings=AS_THEY_ARE)(autoencoder)
train.command(context_settings=AS_THEY_ARE)(diffusion)
train.command(context_settings=AS_THEY_ARE)(distill)
app.add_typer(train, name="train")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(args=arguments, prog_name="latentdiff", standalone_mode=False)
        except typer.TyperException as error:
            return _refuse(error.format_message())
        except UserError as error:
            return _refuse(str(error))
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _no_memory(str(error).lower()):
                raise
            return _refuse("too little memory for this: fewer or smaller pictures")
    return code if isinstance(code, int) else 0


def run() -> int:
    """The console script: `main` in a process of its own.

    What is imported lives until the end: the garbage collector's passes over it, and over all of
    it once more at exit, would take a quarter of the time of one picture.
    """
    keep_freed_memory()
    wait_passively()
    gc.set_threshold(500_000)
    try:
        code = main()
        print(end="", flush=True)  # here, not at exit, where Python would tell it in its own way
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to go
        code = _refuse(f"cannot write: {error.strerror}")
    gc.freeze()
    return code


def _no_memory(said: str) -> bool:
    """Recognise torch's out-of-memory errors by their text, without importing torch."""
    told = "out of memory", "can't allocate memory", "cannot allocate memory"
    return any(words in said for words in told)


def _refuse(message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: object) -> None:
    print("warning:", shown(message), file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"latentdiff {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def latentdiff(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    """Latent diffusion from a shell: pictures out of words and pictures."""
    if context.invoked_subcommand is None:
        print(context.get_help())
