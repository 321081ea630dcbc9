"""Files of learned words (textual inversion, "embeddings"), as the field's tools write them."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.formats.weights import WeightFiles, blaming

BUNDLED = "bundle_emb."
"""Beginning of the names of words that are packed into a LoRA file."""

WORD = "latentdiff_word"
"""Key of the header of a file written here under which its word stands: its tensors have none."""

SIDES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Names that ComfyUI, A1111 and kohya give the text encoders of Stable Diffusion XL."""

_MOST_ROWS = 1000
# Names that say nothing of the word: A1111's, kohya's, OneTrainer's and ComfyUI's.
_NAMELESS = r"emb_params|string_to_param(?:\.\*)?|clip_l|clip_g"
_PACKED = re.compile(rf"{re.escape(BUNDLED)}(?P<word>.+)\.(?P<name>{_NAMELESS})")


def read_words(file: Path, widths: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """The words of a file, each with its rows [n, width] for every text encoder, float32.

    A file of diffusers names its word; others hold rows alone, and the word is the file's name.

    Args:
        file: `learned_embeds.safetensors`, an embedding of A1111, kohya or ComfyUI, or a LoRA with
            words packed in.
        widths: D of the embeddings of each text encoder, by its name.

    Raises:
        UserError: damaged, no such file, or made for another model.
    """
    words: dict[str, dict[str, Tensor]] = {}
    with blaming(file):
        stored = WeightFiles([file])
        packed = [name for name in stored.shapes if name.startswith(BUNDLED)]
        for name in packed or stored.shapes:
            word, encoder = _meant(name, stored.metadata.get(WORD, file.stem), widths)
            if encoder is None:
                continue
            rows = words.setdefault(word, {})
            if encoder in rows:
                raise UserError(f"it holds the word {word!r} twice.")
            rows[encoder] = _rows(stored, name, widths[encoder])
        for word, rows in words.items():
            if missing := widths.keys() - rows.keys():
                raise UserError(
                    f"it has no rows of {word!r} for the {min(missing)}: it is of another model."
                )
    if not words:
        raise UserError(f"{file}: it is empty.")
    return words


def _rows(stored: WeightFiles, name: str, width: int) -> Tensor:
    """The rows [n, width] in a tensor.

    Raises:
        UserError: it holds none of this width.
    """
    shape = stored.shapes[name]
    if len(shape) not in (1, 2) or (len(shape) == 2 and not 1 <= shape[0] <= _MOST_ROWS):
        raise UserError(f"{name}: {list(shape)} are no rows of a learned word.")
    if shape[-1] != width:
        raise UserError(
            f"{name}: its rows are {shape[-1]} wide, the text encoder's {width}; it was "
            "made for another model."
        )
    return stored.read(name, torch.float32, torch.device("cpu")).reshape(-1, width)


def packed_words(names: list[str]) -> list[str]:
    """The words packed into a LoRA file, by the names of its tensors."""
    found = (name.removeprefix(BUNDLED) for name in names if name.startswith(BUNDLED))
    return list(dict.fromkeys(re.sub(rf"\.({_NAMELESS})$", "", name) for name in found))


def _meant(name: str, nameless: str, widths: Mapping[str, int]) -> tuple[str, str | None]:
    """The word and the text encoder that a tensor is of; None for an encoder that is not there, as
    the first in a refiner.

    Args:
        name: of the tensor.
        nameless: the word where the name does not tell it.
        widths: of the model's encoders.
    """
    packed = _PACKED.fullmatch(name)
    if packed is None and name.startswith(BUNDLED):
        raise UserError(f"{name} is not of a learned word for a CLIP text encoder.")
    own = packed["name"] if packed else name
    word = packed["word"] if packed else nameless if re.fullmatch(_NAMELESS, name) else name
    if len(widths) == 1 and "text_encoder" in widths:
        if own == "clip_g":
            raise UserError(f"{name} is not of a learned word for one CLIP text encoder.")
        return word, "text_encoder"
    for encoder, side in SIDES.items():
        if own == side:
            return word, encoder if encoder in widths else None
    raise UserError(
        f"{name}: a word for Stable Diffusion XL has rows for each text encoder, clip_l and "
        "clip_g; this is of another model."
    )
