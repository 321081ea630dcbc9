"""Settings that a picture keeps, as defaults of the options of `latentdiff generate`."""

from pathlib import Path
from typing import Any

import typer

from latentdiff.errors import UserError, warn

_PLAIN = {  # of a record: its option
    "negative_prompt": "negative",
    "prompt_weights": "weights",
    "long_prompts": "long",
    "prompt_syntax": "syntax",
    "clip_skip": "clip_skip",
    "num_inference_steps": "steps",
    "guidance": "guidance",
    "guidance_scale": "guidance_scale",
    "guidance_rescale": "rescale",
    "edits": "guide",
    "seed": "seed",
    "variation_seed": "variation_seed",
    "variation_strength": "variation_strength",
    "height": "height",
    "width": "width",
    "aesthetic_score": "aesthetic_score",
    "negative_aesthetic_score": "negative_aesthetic_score",
    "prediction": "prediction",
    "variant": "variant",
}


def take_settings(context: typer.Context, picture: Path | None) -> Path | None:
    """Let each option that is not given be as it was when a picture was drawn.

    Raises:
        UserError: the picture does not say how it was drawn, or by more than words.
    """
    if picture is None:
        return None
    from latentdiff.formats.picture_text import read_recipe

    recipe = read_recipe(picture)
    settings = recipe.settings
    if "edit" in settings:
        source = settings.get("picture", "another picture")
        raise UserError(f"{picture} was made out of {source}: latentdiff show tells how.")
    if "between" in settings:
        raise UserError(f"{picture} is between two others: latentdiff show tells which.")
    if recipe.left:
        warn(f"{picture}: not taken over from {recipe.program}: {', '.join(recipe.left)}")
    context.default_map = options_of(settings, recipe.program)
    return picture


def options_of(settings: dict[str, Any], program: str) -> dict[str, Any]:
    """The options of `latentdiff generate` that draw what a recipe says.

    Args:
        settings: of a recipe, see `formats.picture_text`.
        program: that wrote them down. Others' solvers have other names, and so has the syntax of
            their prompts.
    """
    from latentdiff.formats.location import BUNDLED

    ours = program == "latentdiff"
    options = {
        option: settings[name] for name, option in _PLAIN.items() if settings.get(name) is not None
    }
    prompt = settings.get("prompt")
    options["prompts"] = prompt if isinstance(prompt, list) else [prompt or ""]
    if isinstance(index := settings.get("index"), int):
        options["first"] = index
    if interval := settings.get("guidance_interval"):
        options["interval"] = ",".join(f"{number}" for number in interval)
    for name in ("original_size", "crop", "target_size"):
        if pair := settings.get(name):
            options[name] = ",".join(f"{number}" for number in pair)
    if also := settings.get("also"):
        options["also"] = [one if isinstance(one, str) else f"{one[0]}:{one[1]}" for one in also]
    if regions := settings.get("regions"):
        options["region"] = regions
    options |= _named(settings, ours)
    if program == "ComfyUI":
        options["weights"] = True
    if program == "A1111":
        options["syntax"] = "a1111"
    if ours and settings.get("dtype") and settings.get("model") == BUNDLED:
        options["dtype"] = settings["dtype"]
    if ours:
        options["engine"] = settings.get("engine", "eager")
    return options


def _named(settings: dict[str, Any], ours: bool) -> dict[str, Any]:
    """Solver and timetable by our names; a name that is none of ours is told."""
    from latentdiff.solvers.aliases import resolve, resolve_timetable

    if ours:
        return {n: settings[n] for n in ("solver", "timetable") if settings.get(n) is not None}
    found: dict[str, Any] = {}
    try:
        if sampler := settings.get("solver"):
            found["solver"], found["timetable"] = resolve(sampler)
        if scheduler := settings.get("timetable"):
            found["timetable"] = resolve_timetable(scheduler)
    except UserError as error:
        warn(f"not taken over: {error}")
    return {name: value for name, value in found.items() if value is not None}


def check_models(picture: Path, model: str | None, loras: list[str] | None) -> None:
    """Check that the files that a picture was drawn with, of which it keeps the names, are given.

    Raises:
        UserError: it was drawn with another model or with LoRAs, and none are named.
    """
    from latentdiff.formats.location import BUNDLED
    from latentdiff.formats.picture_text import read_recipe

    settings = read_recipe(picture).settings
    made_with = settings.get("model") or BUNDLED
    if model is None and made_with != BUNDLED:
        raise UserError(f"{picture} was drawn with {made_with}: name a model, --model PATH.")
    if (kept := settings.get("loras")) and not loras:
        names = ", ".join(f"--lora {name}:{scale}" for name, scale in kept)
        raise UserError(f"{picture} was drawn with LoRAs: name them by their paths, {names}.")
