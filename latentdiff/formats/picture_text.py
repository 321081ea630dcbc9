"""Text of pictures that says how they were drawn: ours, A1111's, ComfyUI's and InvokeAI's words.

The words are anyone's: sizes are bounded, types are checked, and nothing in them is a path that is
opened.
"""

import json
import re
import zlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.picture_formats import suffix_of
from latentdiff.pictures import user_comment
from latentdiff.reading import parse_json, read_bytes, reason

OURS = "latentdiff"  # the keyword of our own text chunk
THEIRS = "parameters"  # of A1111's
_MOST_BYTES = 64 * 2**20  # of a file
_MOST_TEXT = 4 * 2**20  # characters of one text
_MOST_CHUNKS = 2**16
_NODES = 64  # of a ComfyUI graph that one input may lead through


@dataclass(frozen=True)
class Recipe:
    """Settings that a picture was drawn with.

    Attributes:
        program: that wrote it down: latentdiff, A1111, ComfyUI or InvokeAI.
        settings: by the pipeline's names: prompt, negative_prompt, seed, index,
            num_inference_steps, guidance_scale, height, width, solver, timetable, model, strength,
            clip_skip; of our own pictures all that was recorded. Solvers and prompts of others are
            in their spelling, LoRAs of A1111 in its prompts.
        left: names of what else is recorded and has no such name, or no value that makes sense.
    """

    program: str
    settings: dict[str, Any]
    left: list[str] = field(default_factory=list)


def read_recipe(path: Path) -> Recipe:
    """Read how a picture was drawn.

    Raises:
        UserError: the file cannot be read, or says nothing of it.
    """
    try:
        data = read_bytes(path, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"cannot open {path}: {reason(error)}") from None
    recipe = recipe_of(texts_of(data))
    if recipe is None:
        raise UserError(f"{path} says nothing of how it was drawn.")
    return recipe


def texts_of(data: bytes) -> dict[str, str]:
    """The texts of a PNG by their keywords, or a JPEG's or WebP's comment as `parameters`."""
    match suffix_of(data):
        case ".png":
            return dict(_png_texts(data))
        case ".jpg" | ".webp":
            comment = user_comment(data)
            return {THEIRS: comment[:_MOST_TEXT]} if comment else {}
    return {}


def _png_texts(data: bytes) -> Iterator[tuple[str, str]]:
    """The first sound text chunk (PNG specification, section 11.3.3) of each keyword that is read
    here; inflated within bounds, once."""
    at, read = 8, set[str]()
    for _ in range(_MOST_CHUNKS):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at + 8 : at + 8 + size]
        if len(chunk) < size or len(kind) < 4 or kind == b"IEND":
            return
        keyword, _, rest = chunk.partition(b"\0")
        name = keyword[:79].decode("latin-1")
        if kind in (b"tEXt", b"zTXt", b"iTXt") and name in _READERS and name not in read:
            read.add(name)
            text = _text_of(kind, rest)
            if text is not None and len(text) <= _MOST_TEXT:
                yield name, text
        at += 12 + size


def _text_of(kind: bytes, rest: bytes) -> str | None:
    """Text that follows the keyword of a chunk; None where it is damaged."""
    encoding, text = "latin-1", rest
    if kind == b"zTXt":
        text = _inflated(rest[1:])
    elif kind == b"iTXt":
        encoding = "utf-8"
        text = rest[2:].split(b"\0", 2)[-1] if len(rest) > 2 else None
        text = _inflated(text) if text is not None and rest[0] else text
    return None if text is None else text[: _MOST_TEXT + 1].decode(encoding, "replace")


def _inflated(data: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(data, _MOST_TEXT + 1)
    except zlib.error:
        return None


def recipe_of(texts: Mapping[str, str]) -> Recipe | None:
    """The recipe in a picture's texts; our own first, None if there is none."""
    for keyword, read in _READERS.items():
        if keyword not in texts:
            continue
        try:
            recipe = read(texts[keyword])
        except ValueError:
            continue
        if recipe is not None and recipe.settings:
            return recipe
    return None


def _ours(text: str) -> Recipe | None:
    found = parse_json(text)
    return Recipe("latentdiff", found) if isinstance(found, dict) else None


_SETTINGS = {  # of A1111: ours, and the pattern of a value
    "Steps": ("num_inference_steps", int),
    "Sampler": ("solver", str),
    "Schedule type": ("timetable", str),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Model": ("model", str),
    "Clip skip": ("clip_skip", int),
    "Denoising strength": ("strength", float),
}
# Nothing that one part takes is given back to another: a hostile text takes time of its length.
_PAIR = re.compile(r'\s*+([\w/+.-][\w /+.-]*+):\s*+("(?:\\.|[^"\\])*+"|[^,]*+)(?:,|$)')


def _a1111(text: str) -> Recipe | None:
    """The prompt, then `Negative prompt: ...`, and a last line of `Name: value, ...`."""
    lines = text.strip().split("\n")
    pairs = list(_pairs(lines[-1]))
    if len(pairs) < 3:
        if "Steps:" not in text:
            return Recipe("A1111", {"prompt": text.strip()} if text.strip() else {})
        pairs = []
    else:
        lines.pop()
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    if prompt.startswith("Negative prompt:"):
        prompt, negative = "", prompt.removeprefix("Negative prompt:")
    settings: dict[str, Any] = {"prompt": prompt.strip()}
    if negative.strip():
        settings["negative_prompt"] = negative.strip()
    left: list[str] = []
    for name, value in pairs:
        size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value)
        if name == "Size" and size:
            settings |= {"width": int(size[1]), "height": int(size[2])}
        elif name in _SETTINGS and (number := _number(value, _SETTINGS[name][1])) is not None:
            settings[_SETTINGS[name][0]] = number
        elif name not in ("Version", "Model hash"):
            left.append(name)
    if "clip_skip" in settings:
        settings["clip_skip"] = max(0, settings["clip_skip"] - 1)  # A1111 counts the last layer
    return Recipe("A1111", settings, left)


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """The names and values of "Steps: 20, Model: \\"a, b\\""; what is no pair is passed over."""
    at = 0
    while at < len(line):
        found = _PAIR.match(line, at)
        if found is None:
            at = line.find(",", at) + 1 or len(line)
        else:
            yield found[1].strip(), _unquoted(found[2].strip())
            at = found.end()


def _unquoted(text: str) -> str:
    """A value without the quotes that A1111 puts around it, as JSON; or as near as may be."""
    if len(text) < 2 or not text.startswith('"') or not text.endswith('"'):
        return text
    try:
        return json.loads(text, strict=False)
    except ValueError:  # an escape that JSON does not know
        return re.sub(r"\\(.)", r"\1", text[1:-1])


def _number(value: object, kind: type) -> Any:
    """A value as a text, a whole number or a finite one; None where it is none."""
    if kind is str:
        return value if isinstance(value, str) and value else None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 2**64 else None  # False for NaN, too


def _named(
    found: Mapping[str, object], names: Mapping[str, tuple[str, type]]
) -> tuple[dict[str, Any], list[str]]:
    """The values of a record by our names; and the names of those that make no sense."""
    settings: dict[str, Any] = {}
    left: list[str] = []
    for theirs, (ours, kind) in names.items():
        given = found.get(theirs)
        value = _number(given, kind)
        if value is not None:
            settings[ours] = value
        elif given not in (None, "") and not _source(given):
            left.append(theirs)
    return settings, left


_INVOKEAI = {
    "positive_prompt": ("prompt", str),
    "negative_prompt": ("negative_prompt", str),
    "prompt": ("prompt", str),
    "seed": ("seed", int),
    "steps": ("num_inference_steps", int),
    "cfg_scale": ("guidance_scale", float),
    "scheduler": ("solver", str),
    "sampler": ("solver", str),
    "width": ("width", int),
    "height": ("height", int),
}


def _invokeai(text: str) -> Recipe | None:
    found = parse_json(text)
    if not isinstance(found, dict):
        return None
    settings, left = _named(found, _INVOKEAI)
    model = found.get("model")
    if isinstance(model, dict):
        name = model.get("name") or model.get("model_name")
        settings |= {"model": name} if isinstance(name, str) else {}
    known = {*_INVOKEAI, "model", "app_version", "generation_mode"}
    return Recipe("InvokeAI", settings, left + _others(found, known))


def _others(found: Mapping[str, object], known: Container[str]) -> list[str]:
    """Names of what else a record says."""
    said = [name for name, value in found.items() if value not in (None, [], "", False)]
    return [name for name in said if name not in known]


def _old_invokeai(text: str) -> Recipe | None:
    found = parse_json(text)
    image = found.get("image") if isinstance(found, dict) else None
    if not isinstance(image, dict):
        return None
    prompts = image.get("prompt")
    if isinstance(prompts, list) and len(prompts) == 1 and isinstance(prompts[0], dict):
        image = image | {"prompt": prompts[0].get("prompt")}
    settings, left = _named(image, _INVOKEAI)
    known = {*_INVOKEAI, "type"}
    return Recipe("InvokeAI", settings, left + _others(image, known))


_COMFYUI = {
    "seed": ("seed", int),
    "noise_seed": ("seed", int),
    "steps": ("num_inference_steps", int),
    "cfg": ("guidance_scale", float),
    "sampler_name": ("solver", str),
    "scheduler": ("timetable", str),
    "width": ("width", int),
    "height": ("height", int),
    "ckpt_name": ("model", str),
}
_COMFYUI_NODES = {  # of which there is nothing else to know
    "BasicGuider",
    "BasicScheduler",
    "CFGGuider",
    "CLIPTextEncode",
    "CheckpointLoaderSimple",
    "EmptyLatentImage",
    "KSampler",
    "KSamplerAdvanced",
    "KSamplerSelect",
    "RandomNoise",
    "SamplerCustom",
    "SamplerCustomAdvanced",
}
_COMFYUI_OFF: dict[str, tuple[object, ...]] = {  # inputs, by the values that ask for nothing
    "add_noise": ("enable", True),
    "batch_size": (1,),
    "denoise": (1,),
    "end_at_step": (10000,),
    "return_with_leftover_noise": ("disable",),
    "start_at_step": (0,),
}


def _comfyui(text: str) -> Recipe | None:
    """The graph of nodes: the first sampler, and what leads to its inputs."""
    graph = parse_json(text)
    if not isinstance(graph, dict):
        return None
    nodes = {
        name: (f"{node.get('class_type')}", node["inputs"])
        for name, node in graph.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    sampler = next(
        (n for n, (kind, _) in nodes.items() if "KSampler" in kind and "Select" not in kind), None
    )
    sampler = sampler or next(
        (n for n, (kind, _) in nodes.items() if "SamplerCustom" in kind), None
    )
    if sampler is None:
        return None
    settings: dict[str, Any] = {}
    left: set[str] = set()
    for _, inputs in _upstream(nodes, sampler, skip=("positive", "negative", "conditioning")):
        values, wrong = _named(inputs, _COMFYUI)
        settings = values | settings
        left.update(wrong)
    for name, ours in (
        ("positive", "prompt"),
        ("conditioning", "prompt"),
        ("negative", "negative_prompt"),
    ):
        words = _words(nodes, sampler, name)
        if words is not None and ours not in settings:
            settings[ours] = words
    for kind, inputs in _upstream(nodes, sampler):
        left.update({kind} - _COMFYUI_NODES)
        left.update(name for name in _COMFYUI_OFF if not _off(inputs, name))
        if kind == "BasicGuider" and "guidance_scale" not in settings:
            settings["guidance_scale"] = 1.0  # it has none
    return Recipe("ComfyUI", settings, sorted(left))


def _off(inputs: Mapping[str, object], name: str) -> bool:
    value = inputs.get(name)
    return value is None or value in _COMFYUI_OFF[name] or bool(_source(value))


_Nodes = Mapping[str, tuple[str, Mapping[str, Any]]]


def _upstream(
    nodes: _Nodes, start: str, skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A node, and those that its inputs come from, near ones first; each once."""
    waiting, seen = [start], {start}
    while waiting and len(seen) < _NODES:
        kind, inputs = nodes[waiting.pop(0)]
        yield kind, inputs
        for name, value in inputs.items():
            source = _source(value)
            if name not in skip and source in nodes and source not in seen:
                seen.add(source)
                waiting.append(source)


def _words(nodes: _Nodes, sampler: str, name: str) -> str | None:
    """The text of the first encoder that leads to an input of the sampler or of its guider."""
    for _, inputs in [*_upstream(nodes, sampler, skip=("positive", "negative", "conditioning"))]:
        source = _source(inputs.get(name))
        if source not in nodes:
            continue
        for _, found in _upstream(nodes, source):
            for key in ("text", "text_g", "clip_l", "t5xxl"):
                if isinstance(found.get(key), str):
                    return found[key]
    return None


def _source(value: object) -> str:
    """The node that an input comes from, as ["4", 0]; "" for a plain value."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        return value[0]
    return ""


def a1111_text(settings: Mapping[str, Any]) -> str:
    """Our settings as A1111 writes them, for programs that read nothing else."""
    prompt = f"{settings['prompt']}"
    negative = settings.get("negative_prompt") or ""
    if not settings.get("prompt_weights") and settings.get("prompt_syntax") != "a1111":
        prompt, negative = (re.sub(r"([()\[\]\\])", r"\\\1", text) for text in (prompt, negative))
    pairs = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": settings.get("solver"),
        "Schedule type": settings.get("timetable"),
        "CFG scale": settings.get("guidance_scale"),
        "Seed": settings.get("seed"),
        "Size": "{width}x{height}".format(**settings) if settings.get("width") else None,
        "Model": settings.get("model"),
        "Clip skip": settings["clip_skip"] + 1 if settings.get("clip_skip") else None,
        "Index": settings.get("index") or None,
        "Version": f"latentdiff {settings.get('version')}",
    }
    said = ", ".join(
        f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None
    )
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), said])


def _quoted(value: object) -> str:
    text = f"{value}"
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n]', text) else text


_READERS = {  # by the keywords of texts; the first that is there is read
    OURS: _ours,
    "invokeai_metadata": _invokeai,
    "sd-metadata": _old_invokeai,
    "prompt": _comfyui,
    THEIRS: _a1111,
}
