"""Results of runs: a model folder, a LoRA file or learned words, with a card."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import torch

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example
from latentdiff.formats.controlnet import save_controlnet
from latentdiff.learning.card import Outcome, share
from latentdiff.learning.config import ModelRunConfig
from latentdiff.learning.finetune_config import FinetuneConfig
from latentdiff.learning.run import Run
from latentdiff.learning.textual_inversion import save_words, with_learned_words, word_files
from latentdiff.lora import fused, lora_of, save_lora
from latentdiff.models.control import ControlNetwork

LORA_FILE = "pytorch_lora_weights.safetensors"


def save_model(
    run: Run, bundle: Bundle, config: ModelRunConfig, pictures: Sequence[Example], options: str = ""
) -> None:
    """Write `config.out`/model with its card, push it if that was asked for, and say so.

    Args:
        run: says it.
        bundle: the model.
        config: of the run.
        pictures: the pictures it was trained on.
        options: of `latentdiff generate` that draw with it as it was trained.

    Raises:
        UserError: it cannot be written, or not be pushed.
    """
    folder = bundle.save(config.out / "model", dtype=getattr(torch, config.save_dtype))
    command = f'latentdiff generate "..." --model {quote(str(folder))} {options}'
    run.say(f"wrote {folder}", command.rstrip())
    run.say(*share(Outcome(folder, "model", config.model, pictures, config.data.root), config))


def save_outcome(
    bundle: Bundle,
    config: FinetuneConfig,
    pictures: Sequence[Example],
    control: ControlNetwork | None = None,
) -> list[str]:
    """Write what a fine-tune made into `config.out` with its card; push it if that was asked for.

    Args:
        bundle: the model.
        config: of the run.
        pictures: the pictures it was trained on.
        control: the ControlNet that learned beside the model, if one did.

    Returns:
        Lines that say what it is and how to use it.

    Raises:
        UserError: it cannot be written, or not be pushed.
    """
    root = config.data.root
    if control is not None:
        strong = control.strengthened(config.control.strength)
        folder = save_controlnet(strong, config.out / "controlnet", _dtype(config))
        made = "picture" if config.control.field else config.control.kind
        outcome = Outcome(folder, "controlnet", config.model, pictures, root, control=made)
        return [f"wrote {folder}", *share(outcome, config)]
    lines = _save(bundle, config)
    lora = config.method == "lora" and not config.objective.moves
    folder, kind = (config.out, "lora") if lora else (config.out / "model", "model")
    inpaints = bundle.kind == "inpainting"
    words = word_files(config.inversion.tokens) if lora else []
    # diffusers has no names for a LoHa or a LoKr, reads words of one text encoder at a time, and
    # LoRAs into U-Nets
    unread = config.lora.kind in ("loha", "lokr") or (words and len(bundle.conditioner.modules) > 1)
    unread = unread or bundle.network.part != "unet"
    outcome = Outcome(
        folder,
        kind,
        config.model,
        pictures,
        root,
        inpaints=inpaints,
        words=tuple(words),
        in_diffusers=not (lora and unread),
    )
    return [*lines, *share(outcome, config)]


def _dtype(config: FinetuneConfig) -> torch.dtype:
    return getattr(torch, config.save_dtype)


def _save(bundle: Bundle, config: FinetuneConfig) -> list[str]:
    out = config.out
    dtype = _dtype(config)
    wrote: list[Path] = []
    base = "" if config.model is None else f" --model {quote(config.model)}"
    if config.inversion.tokens:
        wrote = save_words(bundle, config.inversion.tokens, out)
    if config.method == "lora":
        more = "".join(f" --embedding {quote(str(word))}" for word in wrote)
        wrote = [save_lora(lora_of(bundle), out / LORA_FILE, layout=config.lora.layout), *wrote]
        if not config.objective.moves:
            command = f'latentdiff generate "..." --lora {quote(str(wrote[0]))}{more}{base}'
            return [*(f"wrote {path}" for path in wrote), command]
        bundle = fused(bundle)  # the file alone does not say what it makes of its model
    if config.inversion.tokens:
        bundle = with_learned_words(bundle)
    bundle.save(out / "model", dtype=dtype)
    wrote.append(out / "model")
    lines = [f"wrote {path}" for path in wrote]
    return [*lines, f'latentdiff generate "..." --model {quote(str(out / "model"))}']
