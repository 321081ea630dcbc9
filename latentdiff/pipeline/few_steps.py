"""Drawing in few steps: the LoRA and the schedule that a model's folder carries for that."""

from dataclasses import replace
from pathlib import Path

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.formats.location import find
from latentdiff.formats.weights import read_json
from latentdiff.lora import attach_lora, load_lora

FOLDER = "fast"
"""Of a model's folder, with a LoRA and a `scheduler_config.json`, as `training/distill.py` leaves
them."""

STEPS = 4


def hastened(bundle: Bundle, where: str | Path | None) -> Bundle:
    """The model as it draws in few steps without guidance: with its own LoRA for that, and the
    solver and times that the LoRA was made for.

    Args:
        bundle: the model; the LoRA, of the name "fast", is put into its networks.
        where: what it was loaded from.

    Raises:
        UserError: it has none, or that is damaged or of another model.
    """
    folder = find(where) / FOLDER
    if not folder.is_dir():
        raise UserError(
            f"{bundle.name}: it has no folder '{FOLDER}' with a LoRA of few steps. One that was "
            "made for it may be given as any other, with its solver, steps and guidance scale; "
            "`latentdiff train distill` makes one."
        )
    name = str(folder / "scheduler_config.json")
    config = read_json(folder / "scheduler_config.json")
    _, prediction, steps, solver = scheduler_config.read(config, name, pipeline="")
    if prediction != bundle.prediction:
        raise UserError(f"{name}: it predicts {prediction}, and the model {bundle.prediction}.")
    attach_lora(bundle, load_lora(folder, bundle), FOLDER, 1.0)
    return replace(
        bundle, solver=solver, steps=steps, num_inference_steps=STEPS, guidance_scale=1.0
    )
