"""`latentdiff finetune` and `latentdiff train ...`: the scripts of training/ as commands.

A script stays the readable form of its stage: a command loads it and hands it every word that
follows. In a wheel the scripts lie in `latentdiff/training`, in a checkout beside the package.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any

import typer

from latentdiff.errors import UserError

# The words go to the script as they are, `--help` too.
AS_THEY_ARE = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="...", help="Options of the script; --help has them all."),
]


def finetune(words: Words = None) -> int:
    """Teach a model your own pictures: --data DIR, and `finetune --help` for all else."""
    return run_script("finetune", words or [])


def autoencoder(words: Words = None) -> int:
    """Stage 1: train an autoencoder; `train autoencoder --help` has the options."""
    return run_script("autoencoder", words or [], "train ")


def diffusion(words: Words = None) -> int:
    """Stage 2: train a denoiser on captions; `train diffusion --help` has the options."""
    return run_script("diffusion", words or [], "train ")


def distill(words: Words = None) -> int:
    """Distil a model into one of few steps; `train distill --help` has the options."""
    return run_script("distill", words or [], "train ")


def run_script(name: str, words: list[str], group: str = "") -> int:
    """Run `training/NAME.py` with these words, in this process; returns its exit code.

    Args:
        group: what stands before the name on the command line.

    Raises:
        UserError: the script is not in this installation, or a mistake in the words.
    """
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command()(_load(name).main)
    code = app(args=words, prog_name=f"latentdiff {group}{name}", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _load(name: str) -> Any:
    package = Path(__file__).parents[1]
    for folder in (package / "training", package.parent / "training"):
        if (path := folder / f"{name}.py").is_file():
            break
    else:
        raise UserError(f"training/{name}.py is not in this installation; reinstall latentdiff")
    called = f"latentdiff_training_{name}"
    spec = spec_from_file_location(called, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[called] = module  # where the classes of its configuration look up their types
    spec.loader.exec_module(module)
    return module
