"""Words in, pictures out."""

import math
import operator
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff import solvers
from latentdiff.bundle import Bundle
from latentdiff.bundle.model import Precision
from latentdiff.denoiser import Condition, conditioned_denoiser
from latentdiff.editing import Canvas, bind, padded_size, picture_size
from latentdiff.errors import UserError
from latentdiff.guidance import classifier_free, named
from latentdiff.inversion import invert
from latentdiff.models.attention import Attention
from latentdiff.noise import NoiseStreams
from latentdiff.pictures import Picture, open_picture, to_pil, to_tensor
from latentdiff.process import NoiseLevel
from latentdiff.registry import check_name
from latentdiff.sampling import Callback, Edit, EditsTimetable, sample
from latentdiff.solvers import Solver
from latentdiff.timetable import Timetable

OutputType = Literal["pil", "pt", "np", "latent"]

MAX_PROMPT = 10_000  # characters
MAX_STEPS = 1000
MAX_SIDE = 4096  # pixels
MAX_PIXELS = 2**28  # of all pictures of a call


@dataclass(frozen=True, slots=True)
class PipelineOutput:
    """What a call of the pipeline gives.

    Attributes:
        images: with output_type "pil" a list of RGB pictures; "pt" a tensor [B, 3, H, W] in
            [0, 1]; "np" an array [B, H, W, 3] in [0, 1]; "latent" the latents.
        seeds: of each picture.
        indices: of each picture within its seed; `pipe(prompt, seed=s, first=i)` with a picture's
            own seed and index draws it again.
        latents: [B, C, h, w] float32, as the run left them.
        nfe: how often the U-Net was called.
        cut: of each picture's prompt, the part that did not fit the model's window; mostly "".
    """

    images: Any
    seeds: list[int]
    indices: list[int]
    latents: Tensor
    nfe: int
    cut: list[str]


class LatentDiffusionPipeline:
    """A model, ready to draw. It keeps nothing between calls, so threads may share it.

    Args:
        bundle: the model.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path | None = None,
        *,
        dtype: Precision | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attention: Attention = "auto",
    ) -> Self:
        """Load a model: see `Bundle.load`.

        Raises:
            UserError: it is missing, damaged or unfit.
        """
        return cls(Bundle.load(where, dtype=dtype, device=device, attention=attention))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance: str = "cfg",
        guidance_scale: float = 4.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        solver: str | Solver = "dpmpp-2m",
        timetable: str | Timetable | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        first: int = 0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        edits: Sequence[Edit] = (),
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool = True,
    ) -> PipelineOutput:
        """Draw.

        Args:
            prompt: what to draw; several draw several, in their order.
            negative_prompt: what to steer away from, for all prompts or one for each.
            height: in pixels, a multiple of the autoencoder's factor; by default the model's own.
            width: likewise.
            num_inference_steps: 1 .. 1000.
            guidance: "cfg", "apg" or "cfg++": see `latentdiff.guidance.named`.
            guidance_scale: its strength; 1 is off ("cfg++" takes 0 .. 1).
            guidance_rescale: see `classifier_free`.
            guidance_interval: see `classifier_free`.
            solver: a name of `solvers.names()`, or a solver.
            timetable: a name of `timetable.names()`, levels from noise to data, or None: the
                timetable the model was made for.
            num_images_per_prompt: how many of each prompt; they follow one another.
            seed: of the noise; picture i of a seed is the same in every batch. A sequence names a
                seed for each picture. None takes a random one, which the output tells.
            first: index of the first picture within its seed.
            generator: where the seed is drawn from, instead of `seed`.
            latents: [B, C, height / factor, width / factor] standard noise to begin with.
            edits: constraints on the run: `latentdiff.editing`, or any that `sample` takes. The
                pictures they hold give the size of the run: height and width are then left out,
                and sides that are no multiple of the autoencoder's factor are padded and cropped.
            output_type: see `PipelineOutput.images`.
            callback_on_step_end: see `sample`.
            progress: show a bar on standard error.

        Raises:
            UserError: an argument is out of range; nothing was drawn.
        """
        bundle = self.bundle
        check_name("output type", output_type, get_args(OutputType))
        prompts = check_prompts(prompt)
        per_prompt = _whole(num_images_per_prompt, "num_images_per_prompt", 1, MAX_PIXELS)
        negatives = _negatives(negative_prompt, len(prompts))
        pictured = picture_size(edits, height, width)
        if pictured is not None:
            height, width = padded_size(pictured, bundle.factor)
        shape = _latent_shape(bundle, height, width, len(prompts) * per_prompt)
        steps = _whole(num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
        if not math.isfinite(guidance_scale):
            raise UserError(f"guidance_scale must be a finite number, not {guidance_scale}.")
        stepper = solvers.create(solver, bundle.process) if isinstance(solver, str) else solver
        if timetable is None or isinstance(timetable, str):
            timetable = bundle.timetable(timetable, steps)
        seeds, indices = _streams(seed, first, generator, shape[0])
        noise = NoiseStreams.of(list(zip(seeds, indices, strict=True)))
        x = _begin(latents, noise, shape, bundle.device)
        own_size = shape[2] * bundle.factor, shape[3] * bundle.factor
        canvas = Canvas(*(pictured or own_size), bundle.factor, bundle.encode, bundle.decode)
        edits, finish = bind(edits, canvas)

        guided = guidance_scale != 1
        conditions, cut = self._conditions(prompts, negatives if guided else None, per_prompt)
        network, calls = _counted(bundle.network())
        denoise = named.create(
            guidance,
            conditioned_denoiser(network, bundle.process, bundle.prediction),
            conditions[0],
            conditions[1] if guided else None,
            timetable,
            scale=guidance_scale,
            rescale=guidance_rescale,
            interval=guidance_interval,
        )
        with tqdm(total=_moves(timetable, edits), disable=not progress, leave=False) as bar:

            def after_move(index: int, level: NoiseLevel, x: Tensor) -> Tensor | None:
                bar.update()
                return (
                    None if callback_on_step_end is None else callback_on_step_end(index, level, x)
                )

            x = sample(
                denoise,
                stepper,
                timetable,
                x * bundle.process.prior_scale(timetable[0]),
                edits=edits,
                noise=noise,
                callback=after_move,
            )
        images = x
        if output_type != "latent":
            images = _finish(finish(canvas.crop(bundle.decode(x))), output_type)
        return PipelineOutput(images, seeds, indices, x, len(calls), cut)

    @torch.no_grad()
    def invert(
        self,
        image: Picture,
        prompt: str = "",
        *,
        num_inference_steps: int = 50,
        solver: str | Solver = "heun",
        timetable: str = "karras",
        refinements: int = 3,
    ) -> Tensor:
        """The noise out of which a run without guidance draws a picture again.

        Given to a call as `latents`, with guidance_scale 1 and the same steps, solver and levels,
        it draws the picture; with another prompt, the picture as that prompt has it.

        Args:
            image: the picture; its sides are padded to multiples of the autoencoder's factor.
            prompt: what it shows.
            num_inference_steps: 1 .. 1000.
            solver: a deterministic one whose steps stand alone.
            timetable: one that ends near the data.
            refinements: see `latentdiff.inversion.invert`.

        Returns:
            [1, C, h, w] float32, about standard noise.

        Raises:
            UserError: no picture, or an argument out of range.
        """
        bundle = self.bundle
        picture = to_tensor(open_picture(image))[None]
        height, width = picture.shape[-2:]
        canvas = Canvas(height, width, bundle.factor, bundle.encode, bundle.decode)
        _latent_shape(bundle, *canvas.padded, 1)
        steps = _whole(num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
        levels = bundle.timetable(timetable, steps)
        stepper = solvers.create(solver, bundle.process) if isinstance(solver, str) else solver
        conditions, _ = self._conditions([prompt], None, 1)
        denoise = classifier_free(
            conditioned_denoiser(bundle.network(), bundle.process, bundle.prediction),
            conditions[0],
            None,
            scale=1,
        )
        latents = canvas.latents(picture).to(bundle.device)
        x = invert(denoise, stepper, levels, latents, refinements=refinements)
        return x / bundle.process.prior_scale(levels[0])

    def _conditions(
        self, prompts: list[str], negatives: list[str] | None, per_prompt: int
    ) -> tuple[list[Condition], list[str]]:
        """Text states for every picture: each different text is encoded once, all in one batch."""
        rows = [prompts] if negatives is None else [prompts, negatives]
        texts = list(dict.fromkeys(text for row in rows for text in row))
        encoded = self.bundle.text.encode(texts)
        for text, lost in zip(texts, encoded.cut, strict=True):
            if lost:
                warnings.warn(
                    f"the prompt {text[:40]!r}... is longer than the model's window of "
                    f"{self.bundle.text.window} tokens; not used: {lost!r}",
                    stacklevel=4,
                )
        conditions: list[Condition] = []
        for row in rows:
            places = [texts.index(text) for text in row for _ in range(per_prompt)]
            condition = {"states": encoded.states[places]}
            if encoded.mask is not None:
                condition["mask"] = encoded.mask[places]
            conditions.append(condition)
        return conditions, [encoded.cut[texts.index(t)] for t in prompts for _ in range(per_prompt)]


def check_prompts(given: str | Sequence[str], name: str = "prompt") -> list[str]:
    """The prompts as a list.

    Raises:
        UserError: one of them is empty (a negative one may be), too long, or no text.
    """
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise UserError(f"{name}: the list is empty; say what to draw.")
    for text in prompts:
        if not isinstance(text, str):
            raise UserError(f"{name}: must be text, not {type(text).__name__}.")
        if name == "prompt" and not text.strip():
            raise UserError("prompt: it is empty; say what to draw.")
        if len(text) > MAX_PROMPT:
            raise UserError(
                f"{name}: it has {len(text):,} characters; at most {MAX_PROMPT:,} are taken."
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{name}: it holds a half character (a lone surrogate), so no text.")
    return prompts


def _negatives(given: str | Sequence[str] | None, count: int) -> list[str]:
    negatives = check_prompts("" if given is None else given, "negative_prompt")
    if len(negatives) not in (1, count):
        raise UserError(f"negative_prompt: {len(negatives)} were given for {count} prompts.")
    return negatives if len(negatives) == count else negatives * count


def _whole(value: int, name: str, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise UserError(f"{name}: must be a whole number from {low} to {high}, not {value!s:.40}.")
    return number


def _latent_shape(
    bundle: Bundle, height: int | None, width: int | None, count: int
) -> tuple[int, int, int, int]:
    sides: list[int] = []
    for name, given, own in zip(("height", "width"), (height, width), bundle.size, strict=True):
        side = _whole(own if given is None else given, name, bundle.factor, MAX_SIDE)
        if side % bundle.factor:
            nearest = max(1, round(side / bundle.factor)) * bundle.factor
            raise UserError(
                f"{name}: must be a multiple of {bundle.factor} with this model, not {side}; "
                f"{nearest} is near."
            )
        sides.append(side)
    if count * sides[0] * sides[1] > MAX_PIXELS:
        raise UserError(
            f"{count} pictures of {sides[0]} x {sides[1]} are too many for one call; ask for fewer."
        )
    return count, bundle.latent_channels, sides[0] // bundle.factor, sides[1] // bundle.factor


def _streams(
    seed: int | Sequence[int] | None, first: int, generator: torch.Generator | None, count: int
) -> tuple[list[int], list[int]]:
    """Seed of each picture, and its index within the seed."""
    first = _whole(first, "first", 0, 2**62)
    if generator is not None:
        if seed is not None:
            raise UserError("seed and generator: give one of them, not both.")
        drawn = torch.randint(2**32, (), generator=generator, device=generator.device)
        seed = int(drawn.item())
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Sequence):
        seeds = [_whole(one, "seed", 0, 2**62) for one in seed]
        if len(seeds) != count:
            raise UserError(f"seed: {len(seeds)} seeds were given for {count} pictures.")
        return seeds, [first] * count
    return [_whole(seed, "seed", 0, 2**62)] * count, list(range(first, first + count))


def _begin(
    latents: Tensor | None,
    noise: NoiseStreams,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor:
    """Standard noise [B, C, h, w] in float32 on the device."""
    if latents is None:
        return noise.draw(shape[1:]).to(device)
    if latents.shape != shape:
        raise UserError(f"latents: must be {list(shape)}, not {list(latents.shape)}.")
    if not bool(torch.isfinite(latents).all()):
        raise UserError("latents: they hold NaN or infinity.")
    return latents.to(device, torch.float32)


def _counted(
    network: Callable[[Tensor, Tensor, Condition], Tensor],
) -> tuple[Callable[[Tensor, Tensor, Condition], Tensor], list[None]]:
    """The network, and a list that grows by one at each of its calls."""
    calls: list[None] = []

    def counting(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        calls.append(None)
        return network(x, t, condition)

    return counting, calls


def _moves(timetable: Timetable, edits: Sequence[Edit]) -> int:
    """How many moves `sample` will make."""
    for edit in edits:
        if isinstance(edit, EditsTimetable):
            timetable = edit.timetable(timetable)
    return len(timetable) - 1


def _finish(pictures: Tensor, output_type: OutputType) -> object:
    """Pictures [B, 3, H, W] about [-1, 1], as the caller wants them."""
    if output_type == "pil":
        return [to_pil(picture) for picture in pictures.cpu()]
    unit = (pictures / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
