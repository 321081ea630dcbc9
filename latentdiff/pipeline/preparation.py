"""Preparation of a run from the arguments of a call: all are checked and encoded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition, Hint
from latentdiff.diffusion.denoiser import Denoiser, conditioned_denoiser
from latentdiff.diffusion.edits import Edit, EditsBranches, EditsConditioned, EditsInput
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.sampling import check_edits, visited
from latentdiff.diffusion.solver import ChoosesSteps, Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import (
    Hires,
    HoldsPicture,
    RunContext,
    SDEdit,
    TiledDiffusion,
    bind,
    padded_size,
    picture_size,
)
from latentdiff.errors import UserError, warn
from latentdiff.guidance import composed, methods
from latentdiff.guidance.from_text import check_text, resolve
from latentdiff.models.guidance_embedding import told_scale
from latentdiff.models.prompt_weights import without_weights
from latentdiff.pipeline.arguments import (
    MAX_PIXELS,
    MAX_STEPS,
    check_sizes,
    finite,
    first_noise,
    latent_shape,
    listed,
    picture_streams,
    run_of,
    whole,
)
from latentdiff.pipeline.controls import check_controls, controls_size, hints_of, unguided
from latentdiff.pipeline.prompts import (
    Further,
    check_also,
    check_negatives,
    check_prompts,
    check_words,
    encode_prompts,
    place_weight,
)
from latentdiff.pipeline.request import Request
from latentdiff.pipeline.run import CountedNetwork, Run

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
    texts = _texts(request)
    check_sizes(request.sizes)
    pictured = picture_size(edits, request.height, request.width)
    size = (request.height, request.width)
    if pictured is None and size == (None, None):
        pictured = controls_size(request.controls)
    if pictured is not None:
        size = padded_size(pictured, bundle.factor)
    shape = latent_shape(bundle, *size, texts.pictures)
    stepper, timetable = _way(request, bundle)
    seeds, indices = picture_streams(request.seed, request.first, request.generator, shape[0])
    noise = NoiseStreams.of(list(zip(seeds, indices, strict=True)))
    x = first_noise(request.latents, noise, shape, bundle.device)

    height, width = pictured or (shape[2] * bundle.factor, shape[3] * bundle.factor)
    if not any(isinstance(edit, TiledDiffusion) for edit in edits):
        warn_of_size(bundle, height, width)
    said = [without_weights(t) if request.prompt_weights else t for t in texts.prompts]
    prompts = [text for text in said for _ in range(texts.per_prompt)]
    context = RunContext(
        height, width, bundle.autoencoder, prompts, bundle.process, bundle.network.native_size
    )
    edits, ending = bind(edits, context)
    for edit in edits:
        if isinstance(edit, Hires):
            latent_shape(bundle, *edit.size, texts.pictures)
    levels = visited(timetable, edits)
    if isinstance(stepper, ChoosesSteps) and len(levels) > len(timetable):
        warn(
            f"the solver chooses its own steps in each of the {len(levels) - 1} moves that the "
            f"edits make of this run, and gives up after {stepper.most_calls} calls of the "
            "network; one of fixed steps, as 'dpmpp-2m', makes one or two a move"
        )
    network = CountedNetwork(bundle.network)
    hints = hints_of(
        request.controls, bundle, context, levels, len(texts.prompts), texts.per_prompt
    )
    denoise, cut = _guided(bundle, network, request, texts, edits, hints, timetable, context, x)
    _warn_of_noise(request, stepper)
    x = x * bundle.process.prior_scale(timetable[0])
    return Run(
        denoise, stepper, levels, x, noise, edits, context, ending, network, seeds, indices, cut
    )


@dataclass(frozen=True)
class _Texts:
    """The texts of a request, before they are encoded.

    Attributes:
        prompts: P texts; "" for each where ready-made conditions were given.
        negatives: P texts.
        further: the composed prompts.
        per_prompt: number of pictures per prompt.
    """

    prompts: list[str]
    negatives: list[str]
    further: list[Further]
    per_prompt: int

    @property
    def pictures(self) -> int:
        return len(self.prompts) * self.per_prompt


def _texts(request: Request) -> _Texts:
    """The prompts of a call, checked."""
    if (request.prompt is None) == (request.prompt_embeds is None):
        raise UserError("prompt: give a prompt, or prompt_embeds, and not both.")
    if request.negative_prompt is not None and request.negative_prompt_embeds is not None:
        raise UserError("negative_prompt: give it or negative_prompt_embeds, not both.")
    if request.prompt is not None:
        prompts = check_prompts(request.prompt)
    else:
        prompts = [""] * _rows(request.prompt_embeds, "prompt_embeds")
    per_prompt = whole(request.num_images_per_prompt, "num_images_per_prompt", 1, MAX_PIXELS)
    listed(request.also, "also", "('a hat', 0.7)")
    further = check_also(request.also)
    if request.prompt_weights:
        check_words(
            [
                *(prompts if request.prompt is not None else ()),
                *(one.text for one in further),
            ]
        )
    negatives = check_negatives(request.negative_prompt, len(prompts))
    return _Texts(prompts, negatives, further, per_prompt)


def _rows(given: Tensor | Condition | None, name: str) -> int:
    """The number of rows of ready-made states [P, L, D], or of a condition with states."""
    states = given.states if isinstance(given, Condition) else given
    fits = isinstance(states, Tensor) and states.is_floating_point() and states.ndim == 3
    if states is None or not fits or not states.numel():
        raise UserError(f"{name}: give states [P, L, D], or a Condition that holds some.")
    return len(states)


def _edits(request: Request, bundle: Bundle) -> list[Edit]:
    """The edits, with those in words made of them."""
    listed(request.edits, "edits", "SDEdit(picture, 0.6), 'pag:3'")
    for edit in request.edits:
        if isinstance(edit, str):
            check_text(edit)
    check_edits([edit for edit in request.edits if not isinstance(edit, str)])
    edits = resolve(request.edits, bundle.device)
    if any(isinstance(edit, Hires) for edit in edits):
        _check_enlargeable(edits)
    return edits


def _check_enlargeable(edits: Sequence[Edit]) -> None:
    """Pass edits that a run with `Hires` can go on with at another size.

    Raises:
        UserError: one holds a picture of the first size, or there are two of `Hires`.
    """
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
    finite(request.scale, "guidance_scale")
    finite(request.guidance_rescale, "guidance_rescale")
    return run_of(request.solver, request.timetable, bundle, steps)


def warn_of_size(bundle: Bundle, height: int, width: int) -> None:
    """Say what is to be expected of pictures larger than those that the model was trained on."""
    own_height, own_width = bundle.size
    times = height * width / (own_height * own_width)
    if times > 1:
        warn(
            f"{width} x {height} pixels are {times:,.1f} times the model's own "
            f"{own_width} x {own_height}: what it draws may fall apart, and takes about as many "
            "times the time and working memory, or more; latentdiff.pictures.fit shrinks a picture"
        )


def _warn_of_noise(request: Request, solver: Solver) -> None:
    if request.guidance == "cfg++" and 0 < request.scale < 1 and solver.stochastic:
        warn(_TOO_MUCH)


def _guided(
    bundle: Bundle,
    network: CountedNetwork,
    request: Request,
    texts: _Texts,
    edits: Sequence[Edit],
    hints: tuple[Hint, ...],
    timetable: Timetable,
    context: RunContext,
    x: Tensor,
) -> tuple[Denoiser, list[str]]:
    """The denoiser of a run, but for what edits do to its estimates; and the prompts' cut ends."""
    seen, image_scale = _beside(edits, x)
    distilled = bundle.network.guidance_width is not None
    if distilled:
        _check_distilled(request, image_scale)
    scale = 1.0 if distilled else request.scale
    settings = {"scale": scale, "rescale": request.guidance_rescale, "image_scale": image_scale}
    methods.check(request.guidance, interval=request.guidance_interval, **settings)
    guided = scale != 1 or image_scale != 1
    positive, negative, further, cut = _conditions(bundle, request, texts, guided, context)
    positive = told_scale(positive, bundle.network, request.scale_for(bundle.network))
    blind = None
    if seen is not None:
        blind = None if negative is None else replace(negative, beside=torch.zeros_like(seen))
        negative = None if negative is None else replace(negative, beside=seen)
        positive = replace(positive, beside=seen)
        further = [replace(each, beside=seen) for each in further]
    if hints:
        positive = replace(positive, control=hints)
        further = [replace(each, control=hints) for each in further]
        untold = unguided(hints)
        negative = None if negative is None else replace(negative, control=untold)
        blind = None if blind is None else replace(blind, control=untold)
    spoiling = [edit for edit in edits if isinstance(edit, EditsBranches)]
    if spoiling:
        network.network = bundle.network.perturbable([edit.perturbation for edit in spoiling])
    denoise = conditioned_denoiser(network, bundle.process, bundle.prediction)
    for edit in edits:
        if isinstance(edit, EditsConditioned):
            denoise = edit.conditioned(denoise)
    for number, edit in enumerate(spoiling, 1):
        denoise = edit.branches(denoise, number)
    if further and negative is not None:
        weights = [place_weight(one, context) for one in texts.further]
        denoise = composed(denoise, list(zip(further, weights, strict=True)), negative)
    guided_denoiser = methods.create(
        request.guidance,
        denoise,
        positive,
        negative,
        timetable,
        interval=request.guidance_interval,
        blind=blind,
        **settings,
    )
    return guided_denoiser, cut


def _check_distilled(request: Request, image_scale: float) -> None:
    """Pass a request that a network with its guidance in it can obey, in one pass a step.

    Raises:
        UserError: it asks for guidance from outside.
    """
    negative = request.negative_prompt or ""
    asked = {
        "negative_prompt": any([negative] if isinstance(negative, str) else negative),
        "negative_prompt_embeds": request.negative_prompt_embeds is not None,
        "also": bool(request.also),
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


def _conditions(
    bundle: Bundle, request: Request, texts: _Texts, guided: bool, context: RunContext
) -> tuple[Condition, Condition | None, list[Condition], list[str]]:
    """Positive and negative condition, the further ones, and the prompts' cut ends."""
    ready = request.prompt_embeds is not None
    away = request.negative_prompt_embeds
    encodes_negative = (guided or bool(texts.further)) and away is None
    rows = ([] if ready else [texts.prompts]) + ([texts.negatives] if encodes_negative else [])
    rows += [[one.text] * len(texts.prompts) for one in texts.further]
    conditions: list[Condition] = []
    cut = [""] * texts.pictures
    if rows:
        conditions, ends = encode_prompts(
            bundle.conditioner,
            rows,
            texts.per_prompt,
            context.padded,
            weights=request.prompt_weights,
            long=request.long_prompts,
        )
        cut = cut if ready else ends
    if request.prompt_embeds is not None:
        conditions.insert(0, _ready(request.prompt_embeds, texts, bundle, "prompt_embeds"))
    positive, *others = conditions
    if away is not None:
        others.insert(0, _ready(away, texts, bundle, "negative_prompt_embeds"))
    negative = others.pop(0) if encodes_negative or away is not None else None
    positive = _sized(bundle, request, positive, context)
    if negative is not None:
        negative = _sized(bundle, request, negative, context, negative=True)
    return positive, negative, [_sized(bundle, request, each, context) for each in others], cut


def _sized(
    bundle: Bundle,
    request: Request,
    condition: Condition,
    context: RunContext,
    *,
    negative: bool = False,
) -> Condition:
    """The condition with the sizes of the call, unless it was given with its own.

    Raises:
        UserError: the network is not told them, or both were given.
    """
    given = request.negative_prompt_embeds if negative else request.prompt_embeds
    if isinstance(given, Condition) and given.sizes is not None:
        for name in request.sizes.given():
            raise UserError(f"{name}: the ready-made condition holds sizes; leave one of them out.")
        return condition
    size = context.padded
    return bundle.conditioner.sized(condition, size, request.sizes, negative=negative)


def _ready(given: Tensor | Condition, texts: _Texts, bundle: Bundle, name: str) -> Condition:
    """A ready-made condition of P rows, or of one, for every picture.

    Raises:
        UserError: another number of rows, states of another width or not finite, or a mask that
            does not fit them.
    """
    rows, wanted = _rows(given, name), len(texts.prompts)
    condition = given if isinstance(given, Condition) else Condition(states=given)
    if rows not in (1, wanted):
        raise UserError(f"{name}: {rows} rows were given for {wanted} prompts.")
    assert condition.states is not None
    if condition.states.shape[2] != bundle.network.width:
        raise UserError(
            f"{name}: the model attends to states of width {bundle.network.width}, not "
            f"{condition.states.shape[2]}."
        )
    if not bool(torch.isfinite(condition.states).all()):
        raise UserError(f"{name}: they hold NaN or infinity.")
    if condition.control:
        raise UserError(f"{name}: its control is not heard: give controls=[Control(...)].")
    mask, shape = condition.mask, condition.states.shape[:2]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise UserError(
            f"{name}: its mask must be bool {list(shape)}, not {mask.dtype} {list(mask.shape)}."
        )
    if any(len(value) != rows for value in condition.given().values()):
        raise UserError(f"{name}: its fields must all have {rows} rows, as its states have.")
    _check_pooled(condition.pooled, bundle.conditioner.pooled_width, name)
    places = range(wanted) if rows == wanted else [0] * wanted
    return condition.take([row for row in places for _ in range(texts.per_prompt)])


def _check_pooled(pooled: Tensor | None, width: int | None, name: str) -> None:
    """Check that a ready-made condition has a pooled vector where the network is told one.

    Raises:
        UserError: it has none, or one that nothing is told; or it is of another width, or not
            finite.
    """
    if width is None and pooled is not None:
        raise UserError(f"{name}: this model is told no pooled text; leave it out.")
    if width is None:
        return
    if pooled is None or pooled.ndim != 2 or pooled.shape[1] != width:
        raise UserError(
            f"{name}: this model is also told a pooled text: give Condition(states=..., "
            f"pooled=...), pooled [P, {width}]."
        )
    if not bool(torch.isfinite(pooled).all()):
        raise UserError(f"{name}: they hold NaN or infinity.")


def _beside(edits: Sequence[Edit], x: Tensor) -> tuple[Tensor | None, float]:
    """Build the image condition that an edit adds beside x, and its guidance scale.

    Raises:
        UserError: more than one edit has an image condition.
    """
    showing = [edit for edit in edits if isinstance(edit, EditsInput)]
    if not showing:
        return None, 1.0
    if len(showing) > 1:
        raise UserError("edits: one Inpaint or Instruct is all that a network can be shown.")
    return showing[0].beside(x), showing[0].image_guidance_scale
