"""Presets of a fine-tune for each kind of model: rates, steps, what it must not unlearn."""

from importlib.resources import files
from typing import Literal

from latentdiff.bundle import Bundle, open_nouns

Method = Literal["lora", "full", "dreambooth", "textual-inversion", "controlnet"]
Preset = Literal["emoji", "sd1", "sd2", "sdxl", "pixart"]
Values = dict[str, object]

_WIDTHS: dict[int, Preset] = {
    768: "sd1",
    1024: "sd2",
}  # of CLIP ViT-L's and OpenCLIP ViT-H's states

# Of the bundled model, on a few dozen pictures or fewer: see docs/finetune.md, docs/control.md.
_EMOJI: dict[str, Values] = {
    "lora": {"lr": 2e-3, "steps": 700, "batch_size": 24},
    "full": {"lr": 3e-4, "steps": 600, "batch_size": 24},
    "dreambooth": {"lr": 5e-5, "steps": 400, "batch_size": 16},
    "textual-inversion": {"lr": 5e-3, "steps": 400, "batch_size": 16},
    "controlnet": {"lr": 5e-4, "steps": 4000, "batch_size": 32},  # on twelve thousand
}
# The rates of diffusers' training guides, not measured here.
_STABLE_DIFFUSION: dict[str, Values] = {
    "lora": {"lr": 1e-4, "steps": 1500, "batch_size": 4},
    "full": {"lr": 1e-5, "steps": 1500, "batch_size": 8},
    "dreambooth": {"lr": 5e-6, "steps": 800, "batch_size": 4},
    "textual-inversion": {"lr": 5e-4, "steps": 3000, "batch_size": 4},
    "controlnet": {"lr": 1e-5, "steps": 15000, "batch_size": 16},
}
_SDXL = _STABLE_DIFFUSION | {
    "full": {"lr": 1e-6, "steps": 1500, "batch_size": 8},
    "dreambooth": {"lr": 1e-6, "steps": 800, "batch_size": 4},
}
OPTIM: dict[str, dict[str, Values]] = {
    "emoji": _EMOJI,
    "sd1": _STABLE_DIFFUSION,
    "sd2": _STABLE_DIFFUSION,
    "sdxl": _SDXL,
    "pixart": _STABLE_DIFFUSION,
}

# Prodigy finds the rate, of which it takes 1; an average takes the place of a schedule.
_OF_OPTIMIZER: dict[str, Values] = {
    "prodigy": {"lr": 1.0},
    "schedule-free": {"schedule": "constant", "ema_decay": 0.0},
}


def preset_of(model: str | None) -> Preset:
    """The preset of a model, whose files are opened and checked but not read.

    One that is neither of Stable Diffusion's families goes by the bundled model's.

    Raises:
        UserError: there is no such model, or its files are unfit.
    """
    family, nouns = open_nouns(model)
    if family == "stable-diffusion-xl":
        return "sdxl"
    if family == "pixart":
        return "pixart"
    return _WIDTHS.get(nouns.conditioner.width, "emoji")


def optim_of(preset: str, method: str, optimizer: str) -> Values:
    """The values of `optim` that a method begins with; no rate for a method that there is not."""
    own = OPTIM[preset].get(method, {})
    inverts = {"weight_decay": 0.0} if method == "textual-inversion" else {}
    ema = 0.99 if method in ("full", "controlnet") else 0.0
    return {"ema_decay": ema, "warmup": 20, **inverts, **own, **_OF_OPTIMIZER.get(optimizer, {})}


def prior_of(preset: str) -> Values:
    """The values of `prior` that say how many prior pictures are drawn and how."""
    if preset == "emoji":
        return {"count": 400, "steps": 10, "guidance_scale": 4.0}
    return {"count": 200, "steps": 25, "guidance_scale": 7.5}


def prior_captions(bundle: Bundle, preset: Preset) -> tuple[list[str], str]:
    """Prompts of what a model must not unlearn, where the person names none; and their origin.

    They are those of the model's own folder, or plain ones for Stable Diffusion, which knows them.
    """
    if bundle.captions:
        return list(bundle.captions), "captions of the model's own folder"
    if preset == "emoji":
        return [], ""
    text = files("latentdiff.learning").joinpath("plain_captions.txt").read_text("utf-8")
    return text.splitlines(), "plain captions of all kinds"
