"""Preparation of a run from the arguments of a call: all are checked and encoded."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Hint
from latentdiff.diffusion.denoiser import Denoiser, conditioned_denoiser
from latentdiff.diffusion.edits import (
    Edit,
    EditsBranches,
    EditsConditioned,
    EditsInput,
    EditsNoiseLevel,
)
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.sampling import check_edits, visited
from latentdiff.diffusion.solver import ChoosesSteps, Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import (
    Enlarge,
    Hires,
    HoldsPicture,
    RunContext,
    SDEdit,
    TiledDiffusion,
    bind,
    padded_size,
    picture_size,
)
from latentdiff.errors import UserError, check_finite, warn
from latentdiff.guidance import composed, methods
from latentdiff.guidance.from_text import check_text, resolve
from latentdiff.guidance.prompt_schedule import StepCount, scheduled
from latentdiff.models.guidance_embedding import told_scale
from latentdiff.models.working_memory import unet_bytes
from latentdiff.pipeline.arguments import (
    MAX_STEPS,
    check_sizes,
    first_noise,
    latent_shape,
    listed,
    picture_streams,
    run_of,
    variation_seeds,
    varied,
    whole,
)
from latentdiff.pipeline.controls import check_controls, controls_size, hints_of, unguided
from latentdiff.pipeline.image_prompts import check_image_prompts, shown
from latentdiff.pipeline.request import Request
from latentdiff.pipeline.run import CountedNetwork, Run
from latentdiff.pipeline.texts import Conditions, Texts, check_loras, encoded, texts_of

_TOO_MUCH = (
    "'cfg++' with a solver that draws noise guides up to twice as much as its scale says; take "
    "about half of it, or a solver that draws none, as 'ddim' or 'dpmpp-2m'"
)


def prepare(bundle: Bundle, request: Request) -> Run:
    """Check a call and make everything that its steps need.

    Raises:
        UserError: an argument is out of range.
    """
    edits = _edits(request, bundle)
    listed(request.controls, "controls", "Control(folder, picture)")
    check_controls(request.controls)
    listed(request.image_prompts, "image_prompts", "ImagePrompt(file, picture)")
    check_image_prompts(request.image_prompts)
    texts = texts_of(request)
    check_sizes(request.sizes)
    check_loras(texts, bundle)
    pictured, shape = _sizes(bundle, request, edits, texts.pictures)
    stepper, timetable = _way(request, bundle)
    seeds, indices = picture_streams(request.seed, request.first, request.generator, shape[0])
    variations = variation_seeds(request.variation_seed, request.variation_strength, shape[0])
    if variations is not None:  # of one picture
        indices = indices[:1] * shape[0]
    noise = NoiseStreams.of(list(zip(seeds, indices, strict=True)))
    x = first_noise(request.latents, noise, shape, bundle.device)
    x = varied(x, request.variation_strength, variations)

    height, width = pictured or (shape[2] * bundle.factor, shape[3] * bundle.factor)
    if not any(isinstance(edit, TiledDiffusion) for edit in edits):
        branches = 1 + (request.scale != 1) + len(texts.further)
        warn_of_size(bundle, shape[0] * branches, height, width)
    prompts = texts.said(request)
    context = RunContext(
        height,
        width,
        bundle.autoencoder,
        prompts,
        bundle.process,
        bundle.network.native_size,
        _levels(request, bundle),
        bundle.network.low_resolution,
        noise,
    )
    edits, ending = bind(edits, context)
    for edit in edits:
        if isinstance(edit, Hires):
            latent_shape(bundle, *edit.size, texts.pictures)
    levels = visited(timetable, edits)
    _warn_of_moves(stepper, len(levels) - 1, len(timetable) - 1)
    network = CountedNetwork(bundle.network, noise)
    hints = hints_of(
        request.controls, bundle, context, levels, len(texts.prompts), texts.per_prompt
    )
    told = _conditions(bundle, request, texts, context, edits, hints, len(levels) - 1, x)
    count = StepCount()
    denoise = _guided(bundle, network, request, told, edits, timetable, x, count)
    _warn_of_noise(request, stepper)
    x = x * bundle.process.prior_scale(timetable[0])
    return Run(
        denoise,
        stepper,
        levels,
        x,
        noise,
        edits,
        context,
        ending,
        network,
        seeds,
        indices,
        told.cut,
        count,
        variations or [],
    )


def _sizes(
    bundle: Bundle, request: Request, edits: Sequence[Edit], pictures: int
) -> tuple[tuple[int, int] | None, tuple[int, int, int, int]]:
    """Height and width of what edits or controls show, if they do, and the shape of all latents."""
    size = (request.height, request.width)
    pictured = picture_size(edits, *size)
    pictured = _enlarged_size(edits, bundle, *(pictured or size)) or pictured
    if pictured is None and size == (None, None):
        pictured = controls_size(request.controls)
    if pictured is not None:
        size = padded_size(pictured, bundle.factor)
    return pictured, latent_shape(bundle, *size, pictures)


def _enlarged_size(
    edits: Sequence[Edit], bundle: Bundle, height: int | None, width: int | None
) -> tuple[int, int] | None:
    """Height and width of what an upscaling model makes of the picture it is shown, if it is.

    Raises:
        UserError: another size is wanted.
    """
    low = bundle.network.low_resolution
    if low is not None and low.residual:
        _check_residual(edits)
    sizes = [edit.run_size(low) for edit in edits if isinstance(edit, Enlarge) and low is not None]
    if not sizes:
        return None
    if (height or sizes[0][0], width or sizes[0][1]) != sizes[0]:
        told = f"{sizes[0][1]} x {sizes[0][0]}"
        raise UserError(
            f"this model makes {told} of that picture: leave out height and width, and give other "
            "edits pictures of that size."
        )
    return sizes[0]


def _check_residual(edits: Sequence[Edit]) -> None:
    """Pass edits that a run can have whose latents are not those of a picture.

    Raises:
        UserError: one holds a picture, or looks at what is drawn.
    """
    for edit in edits:
        if not isinstance(edit, Enlarge | TiledDiffusion):
            raise UserError(
                f"edits: this model draws what Lanczos's enlargement lacks, and no picture, so "
                f"{type(edit).__name__} does not go with it."
            )


def _warn_of_moves(stepper: Solver, moves: int, steps: int) -> None:
    """Tell that a solver of its own steps will take them in each of more moves than were asked."""
    if isinstance(stepper, ChoosesSteps) and moves > steps:
        warn(
            f"the solver chooses its own steps in each of the {moves} moves that the edits make of "
            f"this run, and gives up after {stepper.most_calls} calls of the network; one of fixed "
            "steps, as 'dpmpp-2m', makes one or two a move"
        )


def _edits(request: Request, bundle: Bundle) -> list[Edit]:
    """The edits, with those in words made of them."""
    listed(request.edits, "edits", "SDEdit(picture, 0.6), 'pag:3'")
    for edit in request.edits:
        if isinstance(edit, str):
            check_text(edit)
    check_edits([edit for edit in request.edits if not isinstance(edit, str)])
    edits = resolve(request.edits, bundle.device)
    if any(isinstance(edit, Hires) for edit in edits):
        _check_enlargeable(edits, request)
    return edits


def _check_enlargeable(edits: Sequence[Edit], request: Request) -> None:
    """Pass edits that a run with `Hires` can go on with at another size.

    Raises:
        UserError: one holds a picture of the first size, as controls do, or there are two of
            `Hires`.
    """
    if request.controls:
        raise UserError(
            "controls: their pictures are of the run's first size, so Hires does not go with them."
        )
    if sum(isinstance(edit, Hires) for edit in edits) > 1:
        raise UserError("edits: one Hires is all that a run takes.")
    for edit in edits:
        early = isinstance(edit, SDEdit) and edit.mask is None
        if isinstance(edit, HoldsPicture | EditsInput) and not early:
            raise UserError(
                f"edits: {type(edit).__name__} holds a picture of the run's first size, so Hires "
                "does not go with it; enlarge what comes out in a second call, with SDEdit."
            )


def _way(request: Request, bundle: Bundle) -> tuple[Solver, Timetable]:
    """The solver and the levels before edits."""
    steps = whole(request.num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
    check_finite(request.scale, "guidance_scale")
    check_finite(request.guidance_rescale, "guidance_rescale")
    solver, levels = run_of(request.solver, request.timetable, bundle, steps)
    trained = bundle.steps.trained_steps
    if trained is not None and tuple(levels) != tuple(bundle.timetable(None, trained)):
        warn(
            f"{bundle.name} was trained at the levels of {trained} steps of its own timetable "
            f"alone, and not at those of this run: num_inference_steps={trained} (--steps "
            f"{trained}) is what it can do"
        )
    return solver, levels


def _levels(request: Request, bundle: Bundle) -> Callable[[int], Timetable] | None:
    """See `RunContext.levels`."""
    given = request.timetable
    if not (given is None or isinstance(given, str)):
        return None
    return lambda steps: run_of(request.solver, given, bundle, steps)[1]


def warn_of_size(bundle: Bundle, rows: int, height: int, width: int) -> None:
    """Say what is to be expected of pictures larger than those that the model was trained on.

    Args:
        rows: of a call of the network: pictures times branches.
    """
    own_height, own_width = bundle.size
    times = height * width / (own_height * own_width)
    if times <= 1:
        return
    sides = height // bundle.factor, width // bundle.factor
    needed = unet_bytes(bundle.network.module, rows, *sides)
    memory = "" if needed is None else f", in about {needed / 1e9:,.2f} GB of working memory"
    warn(
        f"{width} x {height} pixels are {times:,.1f} times the model's own "
        f"{own_width} x {own_height}: what it draws may fall apart, and each call of the network "
        f"takes as many times as long, or more{memory}; latentdiff.pictures.fit shrinks a picture"
    )


def _warn_of_noise(request: Request, solver: Solver) -> None:
    if request.guidance == "cfg++" and 0 < request.scale < 1 and solver.stochastic:
        warn(_TOO_MUCH)


def _conditions(
    bundle: Bundle,
    request: Request,
    texts: Texts,
    context: RunContext,
    edits: Sequence[Edit],
    hints: tuple[Hint, ...],
    moves: int,
    x: Tensor,
) -> Conditions:
    """What the network is told in each move: texts, and what it sees beside x."""
    seen, image_scale = _beside(edits, x)
    distilled = bundle.network.guidance_width is not None
    if distilled:
        _check_distilled(request, texts, image_scale)
    settings = _settings(bundle, request, image_scale)
    methods.check(request.guidance, interval=request.guidance_interval, **settings)
    guided = settings["scale"] != 1 or image_scale != 1
    told = encoded(bundle, request, texts, context, guided=guided, moves=moves)
    own_scale = request.scale_for(bundle.network)
    positive = [told_scale(each, bundle.network, own_scale) for each in told.positive]
    told = replace(told, positive=positive)
    if seen:
        told = told.with_fields(seen, seen)
        blank = torch.zeros_like(seen["beside"])
        told = replace(told, blind=[replace(each, beside=blank) for each in told.negative])
    if hints:
        told = told.with_fields({"control": hints}, {"control": unguided(hints)})
    if request.image_prompts:
        toward, away = shown(request.image_prompts, bundle, len(x), guided=bool(told.negative))
        told = told.with_fields({"images": toward}, {"images": away})
    return told


def _guided(
    bundle: Bundle,
    network: CountedNetwork,
    request: Request,
    told: Conditions,
    edits: Sequence[Edit],
    timetable: Timetable,
    x: Tensor,
    count: StepCount,
) -> Denoiser:
    """The denoiser of a run, but for what edits do to its estimates."""
    spoiling = [edit for edit in edits if isinstance(edit, EditsBranches)]
    if spoiling:
        network.network = bundle.network.perturbable([edit.perturbation for edit in spoiling])
    denoise = conditioned_denoiser(network, bundle.process, bundle.prediction)
    for edit in edits:
        if isinstance(edit, EditsConditioned):
            denoise = edit.conditioned(denoise)
    denoise = scheduled(denoise, told.series(), told.stretches, count)
    for number, edit in enumerate(spoiling, 1):
        denoise = edit.branches(denoise, number)
    negative = told.negative[0] if told.negative else None
    if told.composed and negative is not None:
        own, *weights = told.weights
        further = [(series[0], w) for series, w in zip(told.further, weights, strict=True)]
        denoise = composed(denoise, further, negative, own)
    return methods.create(
        request.guidance,
        denoise,
        told.positive[0],
        negative,
        timetable,
        interval=request.guidance_interval,
        blind=told.blind[0] if told.blind else None,
        **_settings(bundle, request, _beside(edits, x)[1]),
    )


def _settings(bundle: Bundle, request: Request, image_scale: float) -> dict[str, float]:
    """The numbers of guidance; a network with its guidance in it has none from outside, and a
    generator, which was trained without any, only what is asked for."""
    network = bundle.network
    unasked = network.noise_width is not None and request.guidance_scale is None
    scale = 1.0 if unasked or network.guidance_width is not None else request.scale
    return {"scale": scale, "rescale": request.guidance_rescale, "image_scale": image_scale}


def _check_distilled(request: Request, texts: Texts, image_scale: float) -> None:
    """Pass a request that a network with its guidance in it can obey, in one pass a step.

    Raises:
        UserError: it asks for guidance from outside.
    """
    negative = request.negative_prompt or ""
    asked = {
        "negative_prompt": any([negative] if isinstance(negative, str) else negative),
        "negative_prompt_embeds": request.negative_prompt_embeds is not None,
        "also": bool(request.also),
        "AND": any(len(prompt.parts) > 1 or prompt.parts[0][1] != 1 for prompt in texts.prompts),
        "guidance": request.guidance != "cfg",
        "guidance_rescale": request.guidance_rescale != 0,
        "guidance_interval": request.guidance_interval != methods.ALWAYS,
        "image_guidance_scale": image_scale != 1,
    }
    if refused := [name for name, given in asked.items() if given]:
        raise UserError(
            f"{refused[0]}: this model was distilled with its guidance in it and makes one pass a "
            "step, so nothing can be led away from: leave it out; guidance_scale alone is heard."
        )


def _beside(edits: Sequence[Edit], x: Tensor) -> tuple[dict[str, Tensor], float]:
    """Build the fields of a condition that an edit with an image adds, and its guidance scale.

    Raises:
        UserError: more than one edit has an image condition.
    """
    showing = [edit for edit in edits if isinstance(edit, EditsInput)]
    if not showing:
        return {}, 1.0
    if len(showing) > 1:
        raise UserError(
            "edits: one Inpaint, Instruct or Enlarge is all that a network can be shown."
        )
    edit = showing[0]
    fields = {"beside": edit.beside(x)}
    if isinstance(edit, EditsNoiseLevel):
        fields["noise_level"] = edit.noise_levels(x)
    return fields, edit.image_guidance_scale
