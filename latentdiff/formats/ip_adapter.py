"""IP-Adapters on disk: the files that are published, beside the image encoder they go with."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latentdiff.errors import UserError
from latentdiff.formats.location import find_file
from latentdiff.formats.weights import PICKLES, WeightFiles, blaming, build, fill, pickle_refusal
from latentdiff.models.image_prompts import AdapterSizes, ImageAdapter, IPAdapter

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

_PROJ, _ENCODER = "image_proj.", "image_encoder"
_HEAD = 64  # width of a head of a resampler, as in every published one
_KEYS = re.compile(r"ip_adapter\.(\d{1,4})\.to_k_ip\.weight")

Shapes = dict[str, tuple[int, ...]]


def load_ip_adapter(
    where: str | Path,
    *,
    encoder: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ImageAdapter:
    """Read an IP-Adapter and its image encoder, after checking all of both.

    Args:
        where: a .safetensors file (`image_proj.…`, `ip_adapter.…`), as `ip-adapter_sd15` and its
            kin of "plus" and "full face" are; or a folder that holds one.
        encoder: the folder of its image encoder, a CLIP of transformers; None: `image_encoder`
            beside the file.
        device: where they shall compute; that of the model saves a copy at each call.
        dtype: precision; likewise.

    Raises:
        UserError: there is none, or it is damaged or of another kind, or the encoder is that of
            another adapter.
    """
    from latentdiff.formats import diffusers_folder as parts

    path = _file(find_file(where, "IP-Adapter"))
    seeing = find_file(encoder or path.parent / _ENCODER, "image encoder")
    with blaming(path):
        files = WeightFiles([path])
        sizes = _sizes(files.shapes)
        module = build(lambda: IPAdapter(sizes), str(path), files, len(sizes.layers))
    vision, values = parts.image_encoder(seeing)
    _check_encoder(sizes, vision, path, seeing)
    for network, source in ((module, files), (vision, values)):
        fill(network, source, dtype, torch.device(device))
    return ImageAdapter(module, vision, path.name)


def _file(path: Path) -> Path:
    """The file of an adapter, or the one in a folder."""
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise UserError(pickle_refusal(path))
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.name for one in found[:20])
        raise UserError(f"{path}: it holds several adapters: name the file, one of {names}.")
    if pickles := sorted(one for one in path.glob("*") if one.suffix.lower() in PICKLES):
        raise UserError(pickle_refusal(pickles[0]))
    raise UserError(f"{path}: it holds no IP-Adapter, a .safetensors file.")


def _sizes(shapes: Shapes) -> AdapterSizes:
    """The sizes of an adapter; all that it does not tell is compared later.

    Raises:
        UserError: it is none, or one of faces that another network must find first.
    """
    own = {n.removeprefix(_PROJ): s for n, s in shapes.items() if n.startswith(_PROJ)}
    numbered = {int(m[1]): shapes[m[0]] for m in map(_KEYS.fullmatch, shapes) if m}
    if not own or not numbered:
        raise UserError("it holds no IP-Adapter (image_proj.* and ip_adapter.*).")
    faces = any(name.startswith("perceiver_resampler.") for name in own)
    if faces or {"proj.0.weight", "norm.weight"} <= own.keys():
        raise UserError(
            "it is a FaceID adapter, which reads the vectors of a face recogniser: that is no part "
            "of latentdiff; ip-adapter-plus-face and ip-adapter-full-face read pictures."
        )
    keys = [numbered[number] for number in sorted(numbered)]
    if any(len(key) != 2 for key in keys):
        raise UserError("ip_adapter.*.to_k_ip.weight must be matrices.")
    layers = [key[0] for key in keys]
    try:
        return _projection(own, layers)
    except (LookupError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"its image_proj is none of the published kinds ({error}).") from error


def _projection(own: Shapes, layers: list[int]) -> AdapterSizes:
    if "latents" in own:
        _, tokens, hidden = own["latents"][:3]
        depth = {int(m[1]) for m in (re.match(r"layers\.(\d{1,4})\.", name) for name in own) if m}
        return AdapterSizes(
            "plus",
            own["proj_in.weight"][1],
            own["proj_out.weight"][0],
            tokens,
            layers,
            hidden,
            own["layers.0.0.to_q.weight"][0] // _HEAD,
            len(depth),
            own["layers.0.1.1.weight"][0],
        )
    if "proj.3.weight" in own:
        return AdapterSizes("full", own["proj.0.weight"][1], own["proj.3.weight"][0], 0, layers)
    rows, inside = own["proj.weight"]
    width = own["norm.weight"][0]
    return AdapterSizes("pooled", inside, width, rows // width, layers)


def _check_encoder(
    sizes: AdapterSizes, encoder: "CLIPVisionModelWithProjection", path: Path, seeing: Path
) -> None:
    """Check that an adapter reads what an encoder gives.

    Raises:
        UserError: it does not.
    """
    config = encoder.config
    given = config.projection_dim if sizes.kind == "pooled" else config.hidden_size
    if given != sizes.inside:
        raise UserError(
            f"{path}: it reads {sizes.inside} numbers of an image encoder, and {seeing} gives "
            f"{given}: name its own encoder's folder with encoder=... (--image-encoder)."
        )
