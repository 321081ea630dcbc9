"""The card of a trained model: what it learned from, and how to use it; and the way to the Hub."""

import json
import math
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCardData

from latentdiff.data.examples import Example
from latentdiff.errors import UserError
from latentdiff.files import write_text, writing
from latentdiff.formats.location import public_name
from latentdiff.formats.weights import first_line, read_json
from latentdiff.learning.config import RunConfig
from latentdiff.version import __version__

SAMPLES = "samples.png"
_SHOWN = 3  # captions
_WHAT = {"lora": "A LoRA", "model": "A latent diffusion model", "controlnet": "A ControlNet"}
_OWN_CLASS = "LatentDiffusionPipeline"  # in the index of what no pipeline of diffusers draws


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run, ready to be shared.

    Attributes:
        folder: the folder that holds it.
        kind: a LoRA beside other files of the run, or a model or ControlNet that fills its folder.
        base: the model the run started from; None for the bundled one, "" for none.
        pictures: the pictures it was trained on.
        root: the folder of the pictures.
        count: the number of all pictures, where `pictures` are only some of them.
        inpaints: whether the model fills holes of pictures.
        words: names of the files of new words that a LoRA was learned with.
        control: of a ControlNet, the kind of its pictures: `editing.control_pictures` has names.
        enlarges: how many times larger the model makes pictures; None where it draws from words.
        in_diffusers: whether diffusers reads the files of a LoRA, as they are.
    """

    folder: Path
    kind: Literal["lora", "model", "controlnet"]
    base: str | None
    pictures: Sequence[Example]
    root: Path
    count: int | None = None
    inpaints: bool = False
    words: tuple[str, ...] = ()
    control: str = "picture"
    enlarges: int | None = None
    in_diffusers: bool = True

    @property
    def files(self) -> list[str] | None:
        """Names of the files to share; None for all of the folder."""
        lora = ["README.md", SAMPLES, "pytorch_lora_weights.safetensors"]
        return [*lora, *self.words] if self.kind == "lora" else None


def write_card(outcome: Outcome, config: RunConfig) -> Path:
    """README.md in the folder, and the newest grid of samples beside it.

    Raises:
        UserError: the files cannot be written.
    """
    grids = sorted((config.out / "pictures").glob("samples-*.png"))
    if grids:
        with writing(outcome.folder / SAMPLES, replace=True) as stage:
            shutil.copyfile(grids[-1], stage)
    path = outcome.folder / "README.md"
    write_text(path, card(outcome, config, bool(grids), sys.argv), replace=True)
    return path


def write_between(path: Path, start: str, end: str, text: str) -> None:
    """Put `text` between two marks of a page.

    Raises:
        UserError: it lacks the marks, or cannot be read or written.
    """
    before, after = around(path, start, end)
    write_text(path, f"{before}{start}\n{text}\n{end}{after}", replace=True)


def around(path: Path, start: str, end: str) -> tuple[str, str]:
    """Split a page into the text before the mark `start` and the text after the mark `end`.

    Raises:
        UserError: the page lacks a mark, or cannot be read.
    """
    try:
        before, first, rest = path.read_text("utf-8").partition(start)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    _, last, after = rest.partition(end)
    if not first or not last:
        raise UserError(f"{path} lacks the marks between which the numbers go: {start} {end}")
    return before, after


def share(outcome: Outcome, config: RunConfig) -> list[str]:
    """Write the card, and push if that was asked for; returns lines that say what was done.

    Raises:
        UserError: see `write_card` and `push`.
    """
    lines = [f"wrote {write_card(outcome, config)}"]
    if config.card.push_to_hub:
        lines.append(f"pushed to {push(outcome, config.card.push_to_hub)}")
    return lines


def card(outcome: Outcome, config: RunConfig, samples: bool, command: Sequence[str]) -> str:
    """The text: YAML for the Hub, then Markdown for people."""
    title = config.out.name or "model"
    on_hub = outcome.base and "/" in outcome.base and not Path(outcome.base).exists()
    task = "text-to-image" if outcome.enlarges is None else "image-to-image"
    head = ModelCardData(
        license=config.card.licence,
        library_name="diffusers" if _their_class(outcome) else "latentdiff",
        pipeline_tag=task,
        tags=["latentdiff", task, *([] if outcome.kind == "model" else [outcome.kind])],
        base_model=outcome.base if on_hub else None,
    )
    base = "the bundled emoji128" if outcome.base is None else public_name(outcome.base)
    made = f"from {base}" if base else "from nothing"
    what = _WHAT[outcome.kind]
    parts = [
        f"# {title}",
        f"{what}, trained {made} with latentdiff {__version__}.",
        f"![samples]({SAMPLES})" if samples else "",
        "## Data",
        describe_pictures(outcome.pictures, outcome.root, outcome.count),
        "## Training",
        _metrics(config),
        f"```sh\n{_typed(command)}\n```",
        "The whole configuration is in `config.yaml` of the run.",
        "## Use",
        _use(outcome),
        "## Licence",
        _licence(config.card.licence),
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"---\n{head}\n---\n\n{text}\n"


def describe_pictures(pictures: Sequence[Example], root: Path, count: int | None = None) -> str:
    """Describe the training pictures; `count` is their number if `pictures` are only some."""
    captions = list(dict.fromkeys(c for picture in pictures for c in picture.captions))
    shown = "; ".join(f"“{' '.join(caption.split())}”" for caption in captions[:_SHOWN])
    many = "different captions" if len(captions) != 1 else "caption"
    said = f" with {len(captions)} {many}: {shown}" if captions else " without captions"
    if count is not None:
        return f"{count} pictures of `{root.name}`, with captions such as {shown}"
    more = " …" if len(captions) > _SHOWN else ""
    return f"{len(pictures)} pictures of the folder `{root.name}`{said}{more}"


def _metrics(config: RunConfig) -> str:
    """Steps, and the loss at the beginning and at the end, of log.jsonl."""
    optim = config.optim
    rows = [
        ("steps", f"{optim.steps}"),
        ("pictures a step", f"{optim.batch_size}"),
        ("learning rate", f"{optim.lr:g}"),
        ("seed", f"{config.seed}"),
    ]
    log = config.out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = max((line["step"] for line in lines), default=optim.steps)
    rows[0] = ("steps", f"{done}")  # a run may end before its last one
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    if losses:
        few = max(1, math.ceil(len(losses) / 10))
        first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
        rows.append(("loss, mean of the first and the last tenth", f"{first:.4f}, {last:.4f}"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)


def _use(outcome: Outcome) -> str:
    here = public_name(str(outcome.folder))  # as the command above was typed, from the same place
    captions = (caption for picture in outcome.pictures for caption in picture.captions)
    prompt = " ".join(next(captions, "a picture").split())
    words, said = shlex.quote(prompt), json.dumps(prompt, ensure_ascii=False)
    command, given, opened, imported = f"generate {words}", "", "", ""
    if outcome.inpaints:
        command = f"inpaint picture.png {words} --mask mask.png"
        given, imported = ", image=picture, mask_image=mask", "from PIL import Image\n"
        opened = 'picture, mask = Image.open("picture.png"), Image.open("mask.png")\n'
    if outcome.enlarges is not None:
        command = f"enlarge picture.png {outcome.enlarges}"
        given, imported = ", image=picture", "from PIL import Image\n"
        opened = 'picture = Image.open("picture.png")\n'
    drawn = f"{opened}image = pipe({said}{given}).images[0]\n```"
    if outcome.kind == "lora":
        base = "" if outcome.base is None else f" --model {shlex.quote(public_name(outcome.base))}"
        words = [f"{here}/{word}" for word in outcome.words]
        more = "".join(f" --embedding {shlex.quote(word)}" for word in words)
        loads = "".join(f"pipe.load_textual_inversion({json.dumps(word)})\n" for word in words)
        ours = f"```sh\nlatentdiff {command} --lora {shlex.quote(here)}{more}{base}\n```"
        if not outcome.in_diffusers:
            return f"{ours}\n\nDiffusers does not read these files."
        return (
            f"{ours}\n\nand in diffusers, with the same base model as `pipe`:\n\n```python\n"
            f"{imported}{loads}pipe.load_lora_weights({json.dumps(here)})\n{drawn}"
        )
    if outcome.kind == "controlnet":
        base = "" if outcome.base is None else f" --model {shlex.quote(public_name(outcome.base))}"
        made = "" if outcome.control == "picture" else f" --control-from {outcome.control}"
        told = f"--control {shlex.quote(here)}:photo.png{made}{base}"
        return (
            f"```sh\nlatentdiff generate {words} {told}\n```\n\n"
            "and in diffusers, for any ControlNet pipeline with the same base model:\n\n"
            "```python\nfrom diffusers import ControlNetModel\n\n"
            f"controlnet = ControlNetModel.from_pretrained({json.dumps(here)})\n```"
        )
    ours = f"```sh\nlatentdiff {command} --model {shlex.quote(here)}\n```\n\n"
    theirs = _their_class(outcome)
    if theirs is None:
        return f"{ours}No pipeline of diffusers draws what this model was trained for."
    return (
        f"{ours}and in diffusers:\n\n```python\n{imported}from diffusers import {theirs}\n\n"
        f"pipe = {theirs}.from_pretrained({json.dumps(here)})\n{drawn}"
    )


def _their_class(outcome: Outcome) -> str | None:
    """The pipeline of diffusers that the index names; a LoRA or a ControlNet goes with any."""
    if outcome.kind != "model":
        return "StableDiffusionPipeline" if outcome.in_diffusers else None
    named = str(read_json(outcome.folder / "model_index.json")["_class_name"])
    return None if named == _OWN_CLASS else named


def _licence(licence: str) -> str:
    if licence != "unknown":
        return (
            f"{licence}, as the trainer declared. The base model and the pictures have their own."
        )
    return (
        "Not declared: before sharing it, look at the licences of the base model and of the "
        "pictures, and say `card.licence=...` when training."
    )


def _typed(command: Sequence[str]) -> str:
    """The words of a process as they are typed: a script under `accelerate launch`, or a command
    of `latentdiff`, which `python -m latentdiff` is, too."""
    program, *words = command
    words = [_public(word) for word in words]
    if Path(program).name in ("latentdiff", "__main__.py"):
        return shlex.join(["latentdiff", *words])
    return f"accelerate launch {shlex.join([_public(program), *words])}"


def _public(word: str) -> str:
    """A word of a command: KEY=VALUE, @FILE, [A, B] or {KEY: VALUE}, with each path as
    `public_name` has it."""
    rest = re.sub(r"^(?:[\w.-]+(?:=|: +))?@?", "", word)
    lead = word[: len(word) - len(rest)]
    if rest.startswith("[") or (rest.startswith("{") and ":" in rest):
        parts = r"[^][{},\"' ][^][{},\"']*"
        return lead + re.sub(parts, lambda found: _public(found[0]), rest)
    return lead + public_name(rest)


def push(outcome: Outcome, repo: str) -> str:
    """Upload to the Hugging Face Hub, as the person who is logged in there; returns the address.

    Raises:
        UserError: it could not be; nothing here is changed.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=outcome.folder, allow_patterns=outcome.files)
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        raise UserError(
            f"{repo}: not pushed to the Hugging Face Hub ({type(error).__name__}: "
            f"{first_line(error)}); everything is in {outcome.folder}: log in with `hf auth login` "
            "and run the same command again."
        ) from None
    return str(address)
