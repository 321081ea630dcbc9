"""Files of learned words (textual inversion, "embeddings"), as the field's tools write them."""

import re
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.formats.weights import WeightFiles, blaming

BUNDLED = "bundle_emb."
"""Beginning of the names of words that are packed into a LoRA file."""

_MOST_ROWS = 1000
# Names that say nothing of the word: A1111's, kohya's, OneTrainer's and ComfyUI's.
_NAMELESS = r"emb_params|string_to_param(?:\.\*)?|clip_l"
_PACKED = re.compile(rf"{re.escape(BUNDLED)}(?P<word>.+)\.(?:{_NAMELESS})")


def read_words(file: Path, width: int) -> dict[str, Tensor]:
    """The words of a file, each with its rows [n, width], float32.

    A file of diffusers names its word; others hold rows alone, and the word is the file's name.

    Args:
        file: `learned_embeds.safetensors`, an embedding of A1111, kohya or ComfyUI, or a LoRA with
            words packed in.
        width: D of the text encoder's embeddings.

    Raises:
        UserError: damaged, no such file, or made for another model.
    """
    words: dict[str, Tensor] = {}
    with blaming(file):
        stored = WeightFiles([file])
        packed = [name for name in stored.shapes if name.startswith(BUNDLED)]
        for name in packed or stored.shapes:
            word = _word(name, file.stem)
            shape = stored.shapes[name]
            if len(shape) not in (1, 2) or (len(shape) == 2 and not 1 <= shape[0] <= _MOST_ROWS):
                raise UserError(f"{name}: {list(shape)} are no rows of a learned word.")
            if shape[-1] != width:
                raise UserError(
                    f"{name}: its rows are {shape[-1]} wide, the text encoder's {width}; it was "
                    "made for another model."
                )
            if word in words:
                raise UserError(f"it holds the word {word!r} twice.")
            words[word] = stored.read(name, torch.float32, torch.device("cpu")).reshape(-1, width)
    if not words:
        raise UserError(f"{file}: it is empty.")
    return words


def packed_words(names: list[str]) -> list[str]:
    """The words packed into a LoRA file, by the names of its tensors."""
    found = (name.removeprefix(BUNDLED) for name in names if name.startswith(BUNDLED))
    return list(dict.fromkeys(re.sub(rf"\.({_NAMELESS}|clip_g)$", "", name) for name in found))


def _word(name: str, stem: str) -> str:
    """The word in the name of a tensor, else the name of the file."""
    if name == "clip_g" or (name.startswith(BUNDLED) and not _PACKED.fullmatch(name)):
        raise UserError(f"{name} is not of a learned word for one CLIP text encoder.")
    if packed := _PACKED.fullmatch(name):
        return packed["word"]
    return stem if re.fullmatch(_NAMELESS, name) else name
