"""Locations of models: bundled, a folder, a single file, or on the Hugging Face Hub."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError, warn
from latentdiff.formats.weights import PICKLES, first_line, pickle_refusal

if TYPE_CHECKING:
    from huggingface_hub import DryRunFileInfo

BUNDLED = "emoji128"
BUNDLED_EDGES = "emoji128-edges"  # a ControlNet
BUNDLED_ENLARGER = "emoji128-enlarge"  # an upscaling model
_FORMER = "emoji64"  # bundled until emoji128 was
PARTS = ("unet", "transformer", "vae", "scheduler")
PARTS += ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = {*PICKLES, ".safetensors"}
_STEM = "diffusion_pytorch_model"
_WORTH_A_LINE = 50_000_000  # bytes
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?://[^/?#]*|(?=[/~]))(?P<path>[^?#]*)")
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


def find(where: str | Path | None) -> Path:
    """The folder of a model, or its file.

    Args:
        where: None or "emoji128" for the bundled model, "emoji128-enlarge" for the upscaling one
            that comes with it, a folder, a .safetensors file, or a hub id as "owner/name".

    Raises:
        UserError: there is no such model, or it is another file.
    """
    if where is None or (where in (BUNDLED, BUNDLED_ENLARGER) and not Path(where).exists()):
        return _bundled(where or BUNDLED)
    if not str(where):
        raise UserError("the name of the model is empty.")
    folder = expanded(where)
    if folder.name == _FORMER and not folder.exists():
        raise UserError(
            f"{where}: this model is bundled no more; '{BUNDLED}', which needs no name, draws what "
            "it drew at 128 pixels and more, but other pictures for the same seed."
        )
    try:
        if folder.is_dir() or (folder.is_file() and folder.suffix == ".safetensors"):
            return folder
        if folder.exists() or folder.suffix.lower() in _FILES:
            raise UserError(_refusal(folder))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name too long for a path, or with a NUL in it
        raise UserError(f"{where!s:.100}: not a model ({first_line(error)}).") from error
    if isinstance(where, str) and _HUB_ID.fullmatch(where):
        kinds = ("*.json", "*.txt", "*.safetensors", "spiece.model")
        parts = [f"{part}/{kind}" for part in (*PARTS, "fast") for kind in kinds]
        return download(where, ["model_index.json", "captions.txt", *parts])
    raise UserError(f"{where}: no such model folder.")


def public_name(where: str) -> str:
    """A path as others may read it: without the folders and the secrets of the machine it is from.

    Names of the Hub and paths below the working folder stay whole. Of a path that is absolute or
    leads upwards the last part is left, of an address the last part of its path: neither who logs
    in nor what is asked for (`?token=...`).
    """
    if address := _ADDRESS.match(where):
        return _last(address["path"]) or "an address"
    outside = where.startswith(("/", "~", "\\")) or _DRIVE.match(where)
    if outside or ".." in re.split(r"[/\\]", where):
        return _last(where) or where
    return where


def _last(path: str) -> str:
    """The last part of a path, in the spelling of any system, that names something."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    return parts[-1] if parts else ""


def find_autoencoder(where: str | Path) -> Path:
    """The folder or file of an autoencoder.

    Args:
        where: its path; or a hub id as "owner/name", of an autoencoder or of a whole model.

    Raises:
        UserError: nothing is there.
    """
    if is_hub_id(where):
        weights = (f"{_STEM}*.safetensors", f"{_STEM}*.safetensors.index*.json", "config.json")
        return download(str(where), [*weights, *(f"vae/{pattern}" for pattern in weights)])
    return find_file(where, "autoencoder")


def is_hub_id(where: str | Path) -> bool:
    """True for the name of a repository of the hub that is no path here."""
    if not _HUB_ID.fullmatch(str(where)) or Path(where).suffix.lower() in _FILES:
        return False
    return not Path(where).exists()


def expanded(where: str | Path) -> Path:
    """A path with the home folder in place of "~".

    Raises:
        UserError: there is no user of that name.
    """
    try:
        return Path(where).expanduser()
    except RuntimeError:
        raise UserError(f"{where!s:.100}: there is no user of that name.") from None


def find_file(where: str | Path, kind: str) -> Path:
    """The file or folder of a part that a model is given.

    Args:
        where: its path, or "emoji128-edges" for the bundled ControlNet.
        kind: for the message, such as "autoencoder".

    Raises:
        UserError: nothing is there.
    """
    path = expanded(where)
    if str(where) == BUNDLED_EDGES and not path.exists():
        path = _asset(BUNDLED_EDGES) or path
    try:
        if not path.is_dir() and not path.is_file():
            raise UserError(f"{path}: no such {kind}.")
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name too long for a path, or with a NUL in it
        raise UserError(f"{where!s:.100}: no {kind} ({first_line(error)}).") from error
    return path


def size_line(planned: "Sequence[DryRunFileInfo]") -> str | None:
    """The size of a download in GB, with the number of files; None where it is not worth a line."""
    missing = [file.file_size or 0 for file in planned if file.will_download]
    if sum(missing) < _WORTH_A_LINE:
        return None
    return f"{sum(missing) / 1e9:.1f} GB in {len(missing)} files"


def _refusal(file: Path) -> str:
    if not file.exists():
        return f"{file}: no such model file."
    if file.suffix.lower() in PICKLES:
        return pickle_refusal(file)
    return f"{file}: a model is a folder in the diffusers layout or a .safetensors file."


def clip_tokenizer() -> Path:
    """The folder of CLIP's tokenizer, which comes with this package.

    Raises:
        UserError: the installation is not whole.
    """
    return _asset("clip/tokenizer") or _bundled(BUNDLED)  # which says how to mend it


def _asset(name: str) -> Path | None:
    package = Path(__file__).parents[1]
    folders = (assets / name for assets in (package / "assets", package.parent / "assets"))
    return next((folder for folder in folders if folder.is_dir()), None)


def _bundled(name: str | Path) -> Path:
    if (folder := _asset(str(name))) is not None:
        return folder
    raise UserError(
        f"the bundled model '{name}' is not in this installation; reinstall latentdiff or "
        "name a model folder."
    )


def download(name: str, patterns: list[str]) -> Path:
    """These files of a repository, out of the local cache where they are there.

    Args:
        name: on the hub, as "owner/name".
        patterns: patterns of the files to fetch; none that could run code.

    Raises:
        UserError: the repository, or one of the files, cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    left_out = ["*non_ema*"]
    with contextlib.suppress(Exception):  # what is wrong is told below
        planned = snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=left_out, dry_run=True
        )
        if size := size_line(planned):
            warn(f"{name}: {size} are downloaded from the Hugging Face Hub")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=left_out))
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise UserError(
            f"{name}: no such folder, and not to be had from the Hugging Face Hub "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
