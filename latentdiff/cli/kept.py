"""Settings that a picture keeps, as defaults of the options of `latentdiff generate`.

A picture may be anyone's: what it says is checked, and no file is opened that it alone names.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import typer

from latentdiff.cli.models import AttentionName, DtypeName, EngineName, hashed
from latentdiff.cli.options import MAX_SEED, RunOptions
from latentdiff.errors import UserError, warn

_RECIPE = "latentdiff.recipe"


def _text(value: object) -> bool:
    return isinstance(value, str)


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not _flag(value) and abs(value) < 2**64


def _whole(low: int, high: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not _flag(value) and low <= value <= high


def _among(kind: object) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str) and value in get_args(kind)


def _listed(one: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(one, value))


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _text(value[0]) and _finite(value[1])


def _two_texts(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _listed(_text)(value)


def _two(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and _listed(_whole(0, 2**31))(value)


def _interval(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(one, int | float) and one >= 0 for one in value)


# Of a record: whether a value makes sense, and its option, where the value is that option's.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str | None]] = {
    "negative_prompt": (_text, "negative"),
    "prompt_weights": (_flag, "weights"),
    "long_prompts": (_flag, "long"),
    "prompt_syntax": (_text, "syntax"),
    "clip_skip": (_whole(0, 100), "clip_skip"),
    "num_inference_steps": (_whole(1, 1000), "steps"),
    "num_images_per_prompt": (_whole(1, 10_000), "number"),
    "guidance": (_text, "guidance"),
    "guidance_scale": (_finite, "guidance_scale"),
    "guidance_rescale": (_finite, "rescale"),
    "seed": (_whole(0, MAX_SEED), "seed"),
    "variation_seed": (_whole(0, MAX_SEED), "variation_seed"),
    "variation_strength": (_finite, "variation_strength"),
    "height": (_whole(1, 2**16), "height"),
    "width": (_whole(1, 2**16), "width"),
    "aesthetic_score": (_finite, "aesthetic_score"),
    "negative_aesthetic_score": (_finite, "negative_aesthetic_score"),
    "prediction": (_text, "prediction"),
    "variant": (_text, "variant"),
    "attention": (_among(AttentionName), "attention"),
    "fast": (_flag, "fast"),
    "solver": (_text, "solver"),
    "timetable": (_text, "timetable"),
    "dtype": (_among(DtypeName), "dtype"),
    "engine": (_among(EngineName), "engine"),
    "prompt": (lambda value: _text(value) or _listed(_text)(value), None),
    "index": (lambda value: _whole(0, 2**62)(value) or _listed(_whole(0, 2**62))(value), None),
    "guidance_interval": (_interval, None),
    "original_size": (_two, None),
    "crop": (_two, None),
    "target_size": (_two, None),
    "also": (_listed(lambda value: _text(value) or _pair(value)), None),
    "regions": (_listed(_text), None),
    "edits": (_listed(_text), None),
    "model": (_text, None),
    "vae": (_text, None),
    "loras": (_listed(_pair), None),
    "embeddings": (_listed(_text), None),
    "controls": (_listed(_text), None),
    "control_from": (_listed(_text), "control_from"),
    "image_prompts": (_listed(_text), None),
    "image_encoder": (_text, None),
    "hashes": (_listed(_two_texts), None),
    "version": (_text, None),
}
# What says how a picture was drawn that no options of `generate` draw.
_ELSEWHERE = {
    "picture": "was made out of {}",
    "edit": "was drawn with edits, {}",
    "between": "is between {}",
    "grid": "is a grid of '{}' under settings that vary",
}
_GO_TOGETHER = {  # what is given anew takes the place of these, too
    "solver": ("timetable",),
    "guidance": ("guidance_scale", "rescale"),
}


def take_settings(context: typer.Context, picture: Path | None) -> Path | None:
    """Let each option that is not given be as it was when a picture was drawn.

    Raises:
        UserError: the picture does not say how it was drawn, or not in words that make sense, or
            it was drawn out of more than words.
    """
    if picture is None:
        return None
    from latentdiff.formats.picture_text import read_recipe

    recipe = read_recipe(picture)
    settings = {name: value for name, value in recipe.settings.items() if value is not None}
    for name, told in _ELSEWHERE.items():
        if name in settings:
            how = told.format(f"{settings[name]!s:.80}")
            raise UserError(f"{picture} {how}: latentdiff show tells the settings.")
    for name, (makes_sense, _) in _SETTINGS.items():
        if name in settings and not makes_sense(settings[name]):
            value = settings[name]
            shown = f"{value!r:.60}" if not isinstance(value, list | dict) else "of a wrong form"
            raise UserError(f"{picture}: its settings are damaged: {name} is {shown}.")
    context.meta[_RECIPE] = settings
    left = [*recipe.left, *(name for name in settings if name not in _SETTINGS)]
    context.default_map, unknown = _options(picture, settings, recipe.program)
    if left := [*left, *unknown]:
        warn(f"{picture}: not taken over from {recipe.program}: {', '.join(left)}")
    return picture


def settled(context: typer.Context, picture: Path, run: RunOptions) -> RunOptions:
    """The options of a run whose others were taken from a picture.

    What goes with an option that is given anew is not taken over: the timetable with the solver.

    Raises:
        UserError: the picture was drawn with files, and they are not named here. It holds the last
            parts of their names, and whose picture it is nobody knows.
    """
    settings = context.meta[_RECIPE]
    missing = _missing(settings, run)
    if missing:
        added = " ".join(f"{option} {shlex.quote(name)}" for option, name in missing)
        raise UserError(
            f"{picture} was drawn with files, of which it keeps no paths: add {added}, with "
            "their paths here."
        )
    _tell_changed(picture, settings, run)
    defaults = {option.name: option.default for option in fields(RunOptions)}
    for name, others in _GO_TOGETHER.items():
        if is_given(context, name):
            dropped = {one: defaults[one] for one in others if not is_given(context, one)}
            run = replace(run, **dropped)
    if is_given(context, "hires") and not is_given(context, "guide"):
        run = replace(run, guide=[one for one in run.guide or () if not one.startswith("hires:")])
    return run


def _tell_changed(picture: Path, settings: Mapping[str, Any], run: RunOptions) -> None:
    """Say which files are not those, of the same names, that a picture was drawn with."""
    told: dict[str, set[str]] = {}
    for name, value in settings.get("hashes", ()):
        told.setdefault(name, set()).add(value)
    for file in run.files:
        if file.name not in told or not file.exists():
            continue  # large files are not hashed for nothing
        found: Any = hashed([file])["hashes"]
        if found[0][1] not in told[file.name]:
            warn(
                f"{file} has changed since {picture} was drawn, or is another file of this name: "
                "what is drawn now is another picture"
            )


def is_given(context: typer.Context, option: str) -> bool:
    """Tell whether an option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _missing(settings: Mapping[str, Any], run: RunOptions) -> list[tuple[str, str]]:
    """The options, with what the picture calls their files, that are to be given."""
    from latentdiff.formats.location import BUNDLED

    missing: list[tuple[str, str]] = []
    if run.model is None and settings.get("model", BUNDLED) != BUNDLED:
        missing.append(("--model", settings["model"]))
    if run.vae is None and "vae" in settings:
        missing.append(("--vae", settings["vae"]))
    if not run.lora:
        missing += [("--lora", f"{name}:{scale}") for name, scale in settings.get("loras", ())]
    if not run.embedding:
        missing += [("--embedding", name) for name in settings.get("embeddings", ())]
    if not run.control:
        missing += [("--control", text) for text in settings.get("controls", ())]
    if not run.image_prompt:
        missing += [("--image-prompt", text) for text in settings.get("image_prompts", ())]
    if run.image_encoder is None and "image_encoder" in settings:
        missing.append(("--image-encoder", settings["image_encoder"]))
    if not run.region:  # where none names a file, they are there
        missing += [("--region", text) for text in settings.get("regions", ())]
    if not run.guide:  # likewise
        missing += [("--guide", text) for text in settings.get("edits", ())]
    return missing


def _options(
    picture: Path, settings: Mapping[str, Any], program: str
) -> tuple[dict[str, Any], list[str]]:
    """The options of `latentdiff generate` that draw what a recipe says, and what they leave out.

    Args:
        settings: of a recipe, see `formats.picture_text`.
        program: that wrote them down. Others' solvers have other names, and so has the syntax of
            their prompts.
    """
    options = {
        option: settings[name]
        for name, (_, option) in _SETTINGS.items()
        if option is not None and name in settings
    }
    options |= _pictures(picture, settings)
    if interval := settings.get("guidance_interval"):
        options["interval"] = ",".join(f"{number}" for number in interval)
    for name in ("original_size", "crop", "target_size"):
        if pair := settings.get(name):
            options[name] = ",".join(f"{number}" for number in pair)
    if also := settings.get("also"):
        options["also"] = [
            one if isinstance(one, str) else f"{one[0]}:{Decimal(f'{one[1]}'):f}" for one in also
        ]
    if not any(map(_has_mask, regions := settings.get("regions", []))):
        options["region"] = regions
    if not _reads_files(picture, guides := settings.get("edits", [])):
        options["guide"] = guides
    for name in ("solver", "timetable"):
        options.pop(name, None)
    named, unknown = _named(settings)
    options |= named
    if program == "ComfyUI":
        options["weights"] = True
    if program == "A1111":
        options["syntax"] = "a1111"
    if program == "latentdiff":  # pictures before engines had names are the network's own
        engine = settings.get("engine", "eager")
        # other machines lack the code or the library, and draw the same without
        options["engine"] = "auto" if engine in ("compiled", "openvino") else engine
    return options, unknown


def _pictures(picture: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say of which prompts, how many and from which index on."""
    prompt, index = settings.get("prompt"), settings.get("index")
    options: dict[str, Any] = {}
    agree = not isinstance(index, list)
    if isinstance(prompt, list):  # of a grid, each as often as it was drawn
        number = settings.get("num_images_per_prompt", 1)
        wanted = [one for one in prompt[::number] for _ in range(number)]
        first = index[0] if isinstance(index, list) and index else 0
        alike = bool(settings.get("variation_strength"))  # all are variations of one index
        places = [first if alike else first + number for number in range(len(prompt))]
        agree = wanted == prompt and (index is None or index == places)
        options |= {"prompts": prompt[::number], "first": first, "grid": True}
    elif prompt:
        options["prompts"] = [prompt]
    if not agree:
        raise UserError(f"{picture}: its settings are damaged: prompt and index do not agree.")
    if isinstance(index, int):
        options["first"] = index
    if "prompts" in options:  # one that begins so would be a file
        options["prompts"] = [f"@{o}" if o.startswith("@") else o for o in options["prompts"]]
    return options


def _has_mask(region: str) -> bool:
    """Tell whether the place of a further prompt is that of a file."""
    return not region.rpartition("@")[2].startswith("box:")


def _reads_files(picture: Path, guides: list[str]) -> bool:
    """Tell whether one of the guides names files.

    Raises:
        UserError: one is none.
    """
    from latentdiff.guidance.from_text import file_of

    try:
        return any(file_of(guide) is not None for guide in guides)
    except UserError as error:
        raise UserError(f"{picture}: its settings are damaged: {error}") from None


def _named(settings: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Solver and timetable by our names; and names that are none of ours."""
    from latentdiff.solvers.aliases import resolve, resolve_timetable

    found: dict[str, str | None] = {}
    unknown: list[str] = []
    try:
        if solver := settings.get("solver"):
            found["solver"], found["timetable"] = resolve(solver)
    except UserError as error:
        unknown.append(f"{error}")
    try:
        if (timetable := settings.get("timetable")) and (told := resolve_timetable(timetable)):
            found["timetable"] = told
    except UserError as error:
        unknown.append(f"{error}")
    return {name: value for name, value in found.items() if value is not None}, unknown
