"""Options that several commands share, with their help, defined once."""

import inspect
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, get_args, get_type_hints

import typer

from latentdiff.cli import controls, image_prompts
from latentdiff.cli.models import (
    AttentionName,
    DtypeName,
    EngineName,
    ModelOptions,
    check_autoencoder,
    hashed,
    preview_autoencoder,
    with_named,
)
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle
    from latentdiff.diffusion.edits import Edit
    from latentdiff.pipeline import Request, Run

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the pictures go.")]
Grid = Annotated[bool, typer.Option("--grid", help="Also write inputs and results, side by side.")]
Fit = Annotated[
    bool,
    typer.Option("--fit/--no-fit", help="Shrink a picture larger than the model's to its size."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A folder, a file or a Hugging Face name. Default: the bundled emoji model.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE:SCALE", help="A LoRA to draw with; may be given again."),
]
Vae = Annotated[
    Path | None,
    typer.Option(
        "--vae",
        metavar="FILE_OR_FOLDER",
        help="An autoencoder in place of the model's own, which many single files lack; or "
        "owner/name on the Hugging Face Hub.",
    ),
]
PredictionName = Annotated[
    str | None,
    typer.Option(
        "--prediction",
        metavar="NAME",
        help="What the network predicts, where its files do not say: eps, v, x0, score or flow.",
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant", metavar="NAME", help="Weights of a folder that has several, as bf16."
    ),
]
Embeddings = Annotated[
    list[Path] | None,
    typer.Option(
        "--embedding",
        metavar="FILE",
        help="Learned words (textual inversion) for prompts; may be given again.",
    ),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        help="Precision of the networks. Of auto on a CPU: bfloat16 for a network of 100 million "
        "parameters or more where the CPU computes in it, else float32."
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Draw in 4 steps without guidance, by the LoRA that the model's folder has for that, "
        "as the bundled model's has.",
    ),
]
Engine = Annotated[
    EngineName,
    typer.Option(
        help="How networks are computed: compiled is fast on a CPU, by code that `latentdiff "
        "compile` made; packed needs none; auto takes the first of both that works, packed not for "
        "a picture or two. openvino, slow at the first picture and fast behind it, is an "
        "extra: pip install 'latentdiff[openvino]'."
    ),
]
Attention = Annotated[
    AttentionName, typer.Option(help="How attention is computed; sdpa is torch's own, and auto.")
]
NoMetadata = Annotated[
    bool, typer.Option("--no-metadata", help="Leave model and settings out of the PNG files.")
]
_LISTED = (
    "One that `latentdiff solvers` lists, or another tool's name of it. Default: the model's own."
)
MAX_SEED = 2**64 - 1


def seed_or_fresh(seed: int | None) -> int:
    """The seed, or a fresh one below 2^32 for none and for -1."""
    return secrets.randbelow(2**32) if seed in (None, -1) else seed


def two_numbers(given: str | None, option: str, form: str) -> tuple[int, int] | None:
    """The two whole numbers of an option; None where it was not given.

    Raises:
        UserError: it does not hold two.
    """
    if given is None:
        return None
    try:
        first, second = map(int, given.split(","))
    except ValueError:
        raise UserError(f"{option} reads {form}, as 768,512, not '{given!s:.40}'.") from None
    return first, second


@dataclass(frozen=True)
class RunOptions:
    """The options of every command that draws from a prompt; `with_run_options` expands them."""

    seed: Annotated[
        int | None,
        typer.Option(
            min=-1,
            max=MAX_SEED,
            help="Seed of the noise; -1, the default, is a fresh one, and printed.",
        ),
    ] = None
    first: Annotated[
        int,
        typer.Option(min=0, help="Index of the first picture of the seed, as in a PNG's text."),
    ] = 0
    variation_seed: Annotated[
        int | None,
        typer.Option(
            min=-1,
            max=MAX_SEED,
            help="Seed of the first picture's variation, see --variation-strength; that of the "
            "next is one higher. -1, the default, is a fresh one.",
        ),
    ] = None
    variation_strength: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="How far the noise of --seed is turned towards that of other seeds: pictures "
            "alike, as 0.1. 0 is off.",
        ),
    ] = 0.0
    out: Out = Path("outputs")
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Number of steps. Default: 20; with --fast 4."),
    ] = None
    guidance: Annotated[str, typer.Option(metavar="NAME", help="cfg, apg or cfg++.")] = "cfg"
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Scale of --guidance; 1 is off. Default: 4; with --fast 1; of cfg++, 0.6 of 0 .. "
            "1."
        ),
    ] = None
    rescale: Annotated[
        float,
        typer.Option(min=0, max=1, help="Guidance rescale (phi): 0 is off, 1 restores contrast."),
    ] = 0.0
    interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH", help="Guide only where sigma / alpha is in this range, as 0.3,5."
        ),
    ] = None
    guide: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:SCALE",
            help="Beside --guidance: pag:3, seg:3, threshold:0.995, autoguidance:SCALE:MODEL, "
            "clip:SCALE:FOLDER, classifier:SCALE:FOLDER:LABEL; tiled:OVERLAP draws pictures larger "
            "than the model's in windows; may be repeated.",
        ),
    ] = None
    hires: Annotated[
        str | None,
        typer.Option(
            metavar="FACTOR[:STRENGTH[:STEPS]]",
            help="Draw, enlarge so many times, and draw the last steps again, as 2 or 2:0.5; of "
            "the strength, 0.5 where none is given. 2:0.5:15 makes 15 steps for it.",
        ),
    ] = None
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="NETWORK:PICTURE[:SCALE]",
            help="Hold to PICTURE by a ControlNet, a folder or a file, or a T2I-Adapter, as "
            "models/canny:photo.png; models/depth:depth.png:0.7 less. May be given again: they "
            "add up.",
        ),
    ] = None
    control_from: Annotated[
        list[str] | None,
        typer.Option(
            "--control-from",
            metavar="KIND",
            help="What is made of the PICTURE of --control first: canny (edges), scribble, grey, "
            "palette, tile; or picture, as it is, the default. Once for all, or for each.",
        ),
    ] = None
    image_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--image-prompt",
            metavar="ADAPTER:PICTURE[:SCALE]",
            help="Draw after PICTURE by an IP-Adapter, as ip-adapter_sd15.safetensors:cat.png, "
            "with the folder image_encoder beside it; with :0.6 behind, less so. May be given "
            "again: they add up.",
        ),
    ] = None
    image_encoder: Annotated[
        Path | None,
        typer.Option(
            "--image-encoder",
            metavar="FOLDER",
            help="The image encoder of --image-prompt, where it is another.",
        ),
    ] = None
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt.")] = None
    also: Annotated[
        list[str] | None,
        typer.Option(
            "--also",
            metavar="TEXT:WEIGHT",
            help="A further prompt and its weight, as 'a hat:0.7' (PROMPT has 1); below 0 steers "
            "away. May be given again. Two things that the model never shows together blur: see "
            "docs/guidance.md, and try --guidance apg.",
        ),
    ] = None
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            metavar="TEXT:WEIGHT@MASK",
            help="A further prompt in a part of the picture, as 'a cat@mask.png' (white) or "
            "'a cat:0.7@box:0,0,32,64'. May be given again.",
        ),
    ] = None
    weights: Annotated[
        bool,
        typer.Option(
            "--weights",
            help="Read weights of words in prompts: (x) is 1.1, (x:1.3) 1.3, [x] 1/1.1, \\( a "
            "bracket.",
        ),
    ] = False
    long: Annotated[
        bool,
        typer.Option(
            "--long",
            help="Read prompts longer than the model's window in chunks, as A1111 does; BREAK ends "
            "one.",
        ),
    ] = False
    syntax: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How prompts are written: plain, or a1111: weights by A1111's rule (by ours with "
            "--weights), long prompts, AND, [from:to:when], [a|b], <lora:NAME:SCALE>; see "
            "docs/prompts.md.",
        ),
    ] = "plain"
    clip_skip: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=100,
            help="Leave out the last layers of the text encoder; 1 is 'Clip skip 2' of A1111.",
        ),
    ] = None
    original_size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHT,WIDTH",
            help="Stable Diffusion XL: the size that a picture of its training data had. Default: "
            "that of the picture drawn.",
        ),
    ] = None
    crop: Annotated[
        str | None,
        typer.Option(metavar="TOP,LEFT", help="Likewise: what was cut off. Default: 0,0."),
    ] = None
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHT,WIDTH", help="Likewise: its size. Default: that of the picture drawn."
        ),
    ] = None
    aesthetic_score: Annotated[
        float | None, typer.Option(help="Of a refiner: the score to draw. Default: 6.")
    ] = None
    negative_aesthetic_score: Annotated[
        float | None, typer.Option(help="Likewise: the score to steer away from. Default: 2.5.")
    ] = None
    solver: Annotated[str | None, typer.Option(metavar="NAME", help=_LISTED)] = None
    timetable: Annotated[str | None, typer.Option(metavar="NAME", help=_LISTED)] = None
    fast: Fast = False
    model: Model = None
    vae: Vae = None
    prediction: PredictionName = None
    variant: Variant = None
    lora: Loras = None
    lora_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the LoRAs lie that prompts name as <lora:NAME:SCALE> with --syntax a1111.",
        ),
    ] = None
    embedding: Embeddings = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    engine: Engine = "auto"
    attention: Attention = "auto"
    no_metadata: NoMetadata = False
    preview: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A PNG that shows what is being drawn, written anew after each step.",
        ),
    ] = None
    preview_vae: Annotated[
        str | None,
        typer.Option(
            "--preview-vae",
            metavar="FILE_OR_FOLDER",
            help="An autoencoder of the same latents to decode the previews with, as TAESD. "
            "Default: none; colours are estimated.",
        ),
    ] = None

    def check(self) -> None:
        """Check the names and settings before anything is loaded.

        Raises:
            UserError: a name is unknown, or a setting makes no sense.
        """
        from latentdiff.formats.location import find_file
        from latentdiff.guidance import methods
        from latentdiff.guidance.from_text import check_text
        from latentdiff.pipeline.prompt_syntax import Syntax
        from latentdiff.pipeline.prompts import check_also, read_region
        from latentdiff.registry import check_name
        from latentdiff.solvers.aliases import resolve_both

        interval = self.guidance_interval
        scale = self.guidance_scale
        methods.check(
            self.guidance,
            scale=methods.default_scale(self.guidance) if scale is None else scale,
            rescale=self.rescale,
            interval=interval,
        )
        for text in self.guides:
            name, _, words = check_text(text)
            if name in ("clip", "classifier"):
                find_file(words[0], f"folder of a {name}")
        if self.preview is not None and self.preview.suffix.lower() != ".png":
            raise UserError(f"--preview writes a PNG: name it so, not {self.preview}.")
        if self.preview_vae is not None:
            if self.preview is None:
                raise UserError("--preview-vae decodes what --preview FILE shows: give that, too.")
            check_autoencoder(self.preview_vae)
        check_also([*(self.also or []), *map(read_region, self.region or [])])
        check_name("prompt syntax", self.syntax, get_args(Syntax))
        resolve_both(self.solver, self.timetable)
        controls.check_controls(self.control or (), self.control_from or ())
        image_prompts.check_image_prompts(self.image_prompt or (), self.image_encoder)
        self.models.check()

    def naming(self, prompts: Sequence[str]) -> Self:
        """The same options; what prompts say of LoRAs, in A1111's syntax, is said by --lora.

        Raises:
            UserError: no such LoRA, or one at two scales; or --lora-dir, which nothing reads.
        """
        if self.syntax != "a1111":
            if self.lora_dir is not None:
                raise UserError("--lora-dir is for --syntax a1111: give both, or neither.")
            return self
        from latentdiff.pipeline.prompt_syntax import without_tags

        _, named = without_tags("<>".join(prompts))
        return replace(self, lora=with_named(self.lora or [], self.lora_dir, named))

    @property
    def models(self) -> ModelOptions:
        """The model, and what goes into it."""
        return ModelOptions(
            self.model,
            self.vae,
            self.prediction,
            self.variant,
            self.lora,
            self.embedding,
            self.fast,
        )

    @property
    def files(self) -> list[Path]:
        """The files and folders that are named, but for the model, the image encoder and what
        autoguidance compares with."""
        from latentdiff.guidance.from_text import check_text, file_of

        places = [text.rpartition("@")[2] for text in self.region or ()]
        guides = [text for text in self.guides if check_text(text)[0] != "autoguidance"]
        return [
            *self.models.files,
            *controls.files_of(self.control or ()),
            *image_prompts.files_of(self.image_prompt or ()),
            *(Path(place) for place in places if not place.startswith("box:")),
            *(Path(file) for file in map(file_of, guides) if file),
        ]

    def about(self, files: Sequence[Path] = ()) -> dict[str, object]:
        """Record what is beside the model, and its attention, for the text chunk of a picture.

        Args:
            files: that one command alone has, such as the picture that is edited.
        """
        record = self.models.about() | hashed([*files, *self.files])
        record |= controls.about(self.control or (), self.control_from or ())
        record |= image_prompts.about(self.image_prompt or (), self.image_encoder)
        return record if self.attention == "auto" else record | {"attention": self.attention}

    @property
    def guides(self) -> list[str]:
        """--guide and --hires, in the words of `guidance.from_text`."""
        if self.hires is None:
            return self.guide or []
        strength = "" if ":" in self.hires else ":0.5"
        return [*(self.guide or []), f"hires:{self.hires}{strength}"]

    @property
    def varied(self) -> int | None:
        """--variation-seed, or a fresh one where there are variations.

        Raises:
            UserError: there is a seed and no strength.
        """
        if self.variation_strength > 0:
            return seed_or_fresh(self.variation_seed)
        if self.variation_seed is not None:
            raise UserError("--variation-seed needs a --variation-strength above 0, up to 1.")
        return None

    @property
    def enlargement(self) -> float:
        """Factor by which the pixels of a picture grow during the run: 4 with --hires 2."""
        from latentdiff.guidance.from_text import second_pass

        second = second_pass(self.guides)
        return 1.0 if second is None else second.factor**2

    @property
    def guidance_interval(self) -> tuple[float, float]:
        """The two numbers of --interval.

        Raises:
            UserError: --interval is not two numbers.
        """
        if self.interval is None:
            return 0.0, math.inf
        try:
            low, high = map(float, self.interval.split(","))
        except ValueError:
            raise UserError(
                f"--interval reads LOW,HIGH, as 0.3,5, not '{self.interval!s:.40}'."
            ) from None
        return low, high

    def show(self, bundle: "Bundle") -> "Callable[[Run], None] | None":
        """Make what --preview asks to be done after each step of a run of this model.

        Raises:
            UserError: the autoencoder of --preview-vae is damaged, or of other latents.
        """
        from latentdiff.cli.output import previewing

        if self.preview is None or self.preview_vae is None:
            return None if self.preview is None else previewing(self.preview, None)
        return previewing(self.preview, preview_autoencoder(self.preview_vae, bundle))

    def request(self, bundle: "Bundle", edits: "list[Edit | str] | None" = None) -> "Request":
        """The request of these options, but for the prompt and what else one command alone has;
        networks of controls and image prompts are read for it."""
        return replace(
            self.settings(bundle, edits),
            controls=controls.opened(self.control or (), self.control_from or (), bundle),
            image_prompts=image_prompts.opened(self.image_prompt or (), self.image_encoder, bundle),
        )

    def settings(self, bundle: "Bundle", edits: "list[Edit | str] | None" = None) -> "Request":
        """The same without controls and image prompts, so that nothing is read."""
        from latentdiff.pipeline import Request
        from latentdiff.pipeline.prompts import read_region
        from latentdiff.solvers.aliases import resolve_both

        solver, timetable = resolve_both(self.solver, self.timetable)
        steps, scale = bundle.settings(self.steps, self.guidance, self.guidance_scale)
        return Request(
            negative_prompt=self.negative,
            also=[*(self.also or []), *map(read_region, self.region or [])],
            prompt_weights=self.weights,
            long_prompts=self.long,
            prompt_syntax=self.syntax,  # pyright: ignore[reportArgumentType]  (checked there)
            clip_skip=self.clip_skip,
            variation_seed=self.varied,
            variation_strength=self.variation_strength,
            num_inference_steps=steps,
            guidance=self.guidance,
            guidance_scale=scale,
            guidance_rescale=self.rescale,
            guidance_interval=self.guidance_interval,
            original_size=two_numbers(self.original_size, "--original-size", "HEIGHT,WIDTH"),
            crop=two_numbers(self.crop, "--crop", "TOP,LEFT"),
            target_size=two_numbers(self.target_size, "--target-size", "HEIGHT,WIDTH"),
            aesthetic_score=self.aesthetic_score,
            negative_aesthetic_score=self.negative_aesthetic_score,
            solver=solver or bundle.solver,
            timetable=timetable or bundle.steps.spacing,
            edits=[*(edits or []), *self.guides],
        )


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command each option of `RunOptions` in place of its parameter `run`, the last one."""

    @wraps(command)
    def expanded(**given: Any) -> None:
        run = RunOptions(**{name: given.pop(name) for name in shared})
        command(run=run, **given)

    hints = get_type_hints(RunOptions, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = {
        option.name: inspect.Parameter(
            option.name, keyword, default=option.default, annotation=hints[option.name]
        )
        for option in fields(RunOptions)
    }
    own = [p for name, p in inspect.signature(command).parameters.items() if name != "run"]
    expanded.__annotations__ = {p.name: p.annotation for p in (*own, *shared.values())}
    signature = inspect.Signature([*own, *shared.values()], return_annotation=None)
    expanded.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return expanded
