"""The spellings of LoRA files: prefix, names of blocks, ends. What is read, written, documented.

`SPELLINGS` is the one list: the reader takes every prefix and every end of it, in any combination,
`docs/models.md` shows it, and a test writes a file in each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from latentdiff.errors import UserError
from latentdiff.lora.factors import Part

Kind = (
    Literal["down", "up", "mid", "alpha", "diff", "diff_b", "dora_scale", "magnitude"]
    | Literal["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"]
    | Literal["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"]
)
"""What a tensor is: of W + alpha / rank * up @ down, with `mid` between them (LoCon's Tucker form),
a plain sum on the weight or the bias (LyCORIS), or of `latentdiff.lora.changes`: a LoHa, a LoKr,
the norms of a DoRA by LyCORIS' name or by peft's."""

HADAMARD: tuple[Kind, ...] = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
)
KRONECKER: tuple[Kind, ...] = (
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
NORMS: tuple[Kind, ...] = ("dora_scale", "magnitude")


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way in which tensors of a LoRA are called.

    Attributes:
        name: for people.
        unet: prefix of the U-Net's layers; with "transformer" for "unet", that of a transformer's.
        text: prefix of the text encoder's; None where it has none of its own.
        blocks: names of layers as in diffusers, or as in latent-diffusion's U-Net (LDM).
        ends: the end of each tensor's name.
        joint: what stands between the parts of a layer's name.
        note: what else a reader should know.
    """

    name: str
    unet: str
    text: str | None
    blocks: Literal["diffusers", "ldm"]
    ends: Mapping[Kind, str]
    joint: str = "."
    note: str = ""

    def spelled(self, part: Part, module: str, kind: Kind) -> str:
        """The name of a tensor.

        Args:
            module: the layer's name, in the names of blocks of this spelling.
        """
        prefix = self.unet if part in _DENOISERS else self.text or ""
        if part == "transformer":
            prefix = prefix.replace("unet", part)
        if part == "text_encoder_2":
            prefix = prefix.replace(*_SECOND_OF[self.joint], 1)
            if module == "text_projection":  # which stands outside of the text model
                prefix = prefix.removesuffix(f"text_model{self.joint}")
        end = self.ends[kind]
        if end.startswith("_lora"):
            parent, _, last = module.removesuffix(".0").rpartition(".")
            last = next((old for old, new in _TEXT_OF_2023.items() if new == last), last)
            return f"{prefix}{parent}.processor.{last}{end}"
        return f"{prefix}{module.replace('.', self.joint)}{end}"


_DENOISERS: tuple[Part, ...] = ("unet", "transformer")
_PEFT: dict[Kind, str] = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
_KOHYA: dict[Kind, str] = {
    "down": ".lora_down.weight",
    "up": ".lora_up.weight",
    "alpha": ".alpha",
}
_TUCKER: dict[Kind, str] = {**_KOHYA, "mid": ".lora_mid.weight"}
_SUMS: dict[Kind, str] = {"diff": ".diff", "diff_b": ".diff_b"}
_TEXT = "text_encoder.text_model."

SPELLINGS: tuple[Spelling, ...] = (
    Spelling("diffusers", "unet.", _TEXT, "diffusers", _PEFT, note="alpha in the header; written"),
    Spelling(
        "diffusers, text encoders before 2024",
        "unet.",
        _TEXT,
        "diffusers",
        {"down": ".lora_linear_layer.down.weight", "up": ".lora_linear_layer.up.weight"},
        note="what its training scripts still write for text encoders; written for these",
    ),
    Spelling(
        "diffusers in 2023",
        "unet.",
        _TEXT,
        "diffusers",
        {"down": "_lora.down.weight", "up": "_lora.up.weight"},
        note="attention processors",
    ),
    Spelling(
        "diffusers, converted",
        "unet.",
        _TEXT,
        "diffusers",
        {"down": ".lora.down.weight", "up": ".lora.up.weight"},
    ),
    Spelling(
        "without a prefix", "", None, "diffusers", _PEFT, note="a U-Net's or an encoder's own"
    ),
    Spelling(
        "peft",
        "base_model.model.",
        "base_model.model.text_model.",
        "diffusers",
        _PEFT,
        note="alpha in adapter_config.json; written with it, and in the header",
    ),
    Spelling("diffusers' paths, kohya's ends", "unet.", _TEXT, "diffusers", _KOHYA),
    Spelling(
        "kohya",
        "lora_unet_",
        "lora_te_text_model_",
        "diffusers",
        _KOHYA,
        "_",
        note="A1111, Forge, ComfyUI; `lora_te1_` and `lora_te2_` too; written",
    ),
    Spelling(
        "kohya on LDM blocks",
        "lora_unet_",
        "lora_te_text_model_",
        "ldm",
        _KOHYA,
        "_",
        note="written for Stable Diffusion XL",
    ),
    Spelling(
        "ComfyUI",
        "diffusion_model.",
        "text_encoders.clip_l.transformer.text_model.",
        "ldm",
        _KOHYA,
        note="peft's ends too",
    ),
    Spelling(
        "LoCon in Tucker form",
        "lora_unet_",
        "lora_te_text_model_",
        "diffusers",
        _TUCKER,
        "_",
        note="convolutions",
    ),
    Spelling(
        "sums of LyCORIS and ComfyUI",
        "lora_unet_",
        "lora_te_text_model_",
        "diffusers",
        _SUMS,
        "_",
        note="weights and biases; of norms also `.w_norm` and `.b_norm`; written in kohya's layout",
    ),
)

_ENDS: dict[str, Kind] = {
    **{end: kind for spelling in SPELLINGS for kind, end in spelling.ends.items()},
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".{kind}": kind for kind in (*HADAMARD, *KRONECKER)},
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
_EITHER: tuple[Part, ...] = (*_DENOISERS, "text_encoder")
# With underscores only, which is all that kohya's files tell; the longest first.
_PREFIXES: list[tuple[str, tuple[Part, ...]]] = sorted(
    {
        ("lora_unet_", ("unet",)),
        ("unet_", ("unet",)),
        ("lora_transformer_", ("transformer",)),
        ("transformer_", ("transformer",)),
        ("diffusion_model_", ("unet",)),
        ("model_diffusion_model_", ("unet",)),
        ("lora_te_", ("text_encoder",)),
        ("lora_te1_", ("text_encoder",)),
        ("lora_te2_", ("text_encoder_2",)),
        ("text_encoder_", ("text_encoder",)),
        ("text_encoder_2_", ("text_encoder_2",)),
        ("text_encoders_clip_l_transformer_", ("text_encoder",)),
        ("text_encoders_clip_g_transformer_", ("text_encoder_2",)),
        ("base_model_model_", _EITHER),
        ("", _EITHER),
    },
    key=lambda pair: -len(pair[0]),
)
SECOND = ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.")
"""Beginnings of names of the second text encoder's layers."""

_LATER = ("lora_te3_", "text_encoder_3.")
TRANSFORMER = ("lora_transformer_", "transformer.")
"""Beginnings of names of a transformer's layers."""

# Of prefixes with dots and with underscores: what names the first text encoder, and the second.
_SECOND_OF = {".": ("text_encoder.", "text_encoder_2."), "_": ("lora_te1_", "lora_te2_")}
_TEXT_OF_2023 = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, slots=True)
class Name:
    """A tensor's name, taken apart.

    Attributes:
        stem: the name without its end.
        kind: what the end says.
    """

    stem: str
    kind: Kind

    def places(self) -> Iterator[tuple[Part, str]]:
        """The layers that it may mean, likely ones first: part, and name with underscores only."""
        flat = self.stem.replace(".", "_")
        for prefix, parts in _PREFIXES:
            if not flat.startswith(prefix):
                continue
            for part in parts:
                rest = flat.removeprefix(prefix)
                if part not in _DENOISERS:
                    rest = rest.removeprefix("text_model_")
                    head, _, last = rest.rpartition("_to_")
                    rest = (
                        f"{head}_{_TEXT_OF_2023.get(f'to_{last}', f'to_{last}')}" if head else rest
                    )
                yield part, rest
                yield part, f"{rest}_0"  # to_out of 2023 is to_out.0


def parse(stored: str) -> Name:
    """Take the name of a tensor apart.

    Raises:
        UserError: it is none of a LoRA that loads here.
    """
    if stored.startswith(_LATER):
        raise UserError(f"{stored} is newer than Stable Diffusion XL, which does not load here.")
    name = stored.replace(".processor.", ".")
    for end in sorted(_ENDS, key=len, reverse=True):
        if name.endswith(end) and len(name) > len(end):
            return Name(name.removesuffix(end), _ENDS[end])
    raise UserError(
        f"{stored} is not of a LoRA, LoCon, LoHa, LoKr, DoRA or a sum, in any layout of "
        "docs/models.md; others, as (IA)^3, GLoRA and OFT, do not load here."
    )


def table() -> str:
    """The table of `docs/models.md`: each spelling with the name of one tensor."""
    modules = {
        "diffusers": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "ldm": "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    }
    rows = ["| layout | a tensor of it | |", "|---|---|---|"]
    for spelling in SPELLINGS:
        kind = next(iter(spelling.ends)) if "mid" not in spelling.ends else "mid"
        example = spelling.spelled("unet", modules[spelling.blocks], kind)
        rows.append(f"| {spelling.name} | `{example}` | {spelling.note} |")
    return "\n".join(rows)
