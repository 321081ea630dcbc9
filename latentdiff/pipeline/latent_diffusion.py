"""Words in, pictures out."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from latentdiff import lora
from latentdiff.bundle import Bundle, Precision
from latentdiff.diffusion.denoiser import (
    Condition,
    LearnedVarianceDenoiser,
    conditioned_denoiser,
    mark,
)
from latentdiff.diffusion.inversion import invert
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.sampling import Callback, Edit, EditsInput, EditsTimetable, sample
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import Canvas, bind, padded_size, picture_size
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.guidance import classifier_free, composed, named
from latentdiff.guidance.guides import (
    Guide,
    Scene,
    SpoilsAttention,
    resolve,
    spoil_attention,
    steer,
)
from latentdiff.guidance.named import Method
from latentdiff.models.attention import Attention
from latentdiff.pictures import Picture, open_picture, to_pil, to_tensor
from latentdiff.pipeline.arguments import (
    MAX_PIXELS,
    MAX_STEPS,
    finite,
    first_noise,
    latent_shape,
    listed,
    picture_streams,
    run_of,
    solver_of,
    whole,
)
from latentdiff.pipeline.prompt_weights import without_weights
from latentdiff.pipeline.prompts import (
    Also,
    check_also,
    check_negatives,
    check_prompts,
    encode_prompts,
    seeing,
)
from latentdiff.registry import check_name
from latentdiff.solvers import Solver

OutputType = Literal["pil", "pt", "np", "latent"]

_TOO_MUCH = (
    "'cfg++' with a solver that draws noise guides up to twice as much as its scale says; take "
    "about half of it, or a solver that draws none, as 'ddim' or 'dpmpp-2m'"
)


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

    A LoRA is a property of the model: `load_lora`, `set_loras` and `remove_lora` must not be called
    while another thread draws.

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

    @property
    def scheduler(self) -> Any:
        """diffusers' scheduler object of the model's own sampler, as its pipelines have it.

        Setting another, as `pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config)`, makes its method, times and settings the model's own, not while
        another thread draws.

        Raises:
            UserError: diffusers has none for this model; or what is set is none, or is configured
                as none here.
        """
        bundle = self.bundle
        described = bundle.process, bundle.prediction, bundle.steps, bundle.solver
        return scheduler_config.to_object(described, learned_variance=bundle.learns_variance)

    @scheduler.setter
    def scheduler(self, scheduler: object) -> None:
        process, prediction, steps, solver = scheduler_config.read_object(scheduler)
        told = {"process": process, "prediction": prediction, "steps": steps, "solver": solver}
        self.bundle = replace(self.bundle, **told)

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Put a LoRA into the model, beside those that are in it.

        Args:
            path: a .safetensors file in the layout of diffusers or of kohya, or a folder with
                `pytorch_lora_weights.safetensors`.
            scale: its strength.
            name: for `set_loras` and `remove_lora`; by default the file's.

        Returns:
            The name.

        Raises:
            UserError: no such file, no LoRA for this model, or the name is taken; nothing changed.
        """
        name = lora.default_name(path) if name is None else name
        lora.attach_lora(self.bundle, lora.load_lora(path, self.bundle), name, scale)
        return name

    def set_loras(self, scales: Mapping[str, float]) -> None:
        """Set the strength of LoRAs in the model, by name; 0 is off. Others keep theirs.

        Raises:
            UserError: there is no such LoRA, or a scale is not finite; nothing changed.
        """
        lora.scale_loras(self.bundle, scales)

    def remove_lora(self, name: str) -> None:
        """Take a LoRA out of the model; what it was without comes back, bit for bit.

        Raises:
            UserError: there is no such LoRA.
        """
        lora.detach_lora(self.bundle, name)

    def fuse_loras(self) -> Bundle:
        """A new model with the LoRAs in its weights, to draw with or to `save`; this one stays.

        Raises:
            UserError: there are none.
        """
        return lora.fused(self.bundle)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        also: Sequence[Also] = (),
        prompt_weights: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance: str | Method = "cfg",
        guidance_scale: float = 4.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        solver: str | Solver | None = None,
        timetable: str | Timetable | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        first: int = 0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        edits: Sequence[Edit] = (),
        guides: Sequence[Guide | str] = (),
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool = True,
    ) -> PipelineOutput:
        """Draw.

        Args:
            prompt: what to draw; several draw several, in their order.
            negative_prompt: what to steer away from, for all prompts or one for each.
            also: further prompts for every picture and their weights beside the prompt's 1, as
                ("a hat", 0.7) or "a hat:0.7"; see `latentdiff.guidance.composition`.
            prompt_weights: read (x), (x:1.3) and [x] in all prompts as weights of their words.
            height: in pixels, a multiple of the autoencoder's factor; by default the model's own.
            width: likewise.
            num_inference_steps: 1 .. 1000.
            guidance: "cfg", "apg" or "cfg++"; or a method of one's own, as
                `partial(guidance.projected, momentum=-0.5)`: see `latentdiff.guidance.named`.
            guidance_scale: its strength; 1 is off ("cfg++" takes 0 .. 1).
            guidance_rescale: see `classifier_free`.
            guidance_interval: see `classifier_free`.
            solver: a name of `solvers.names()`, a solver, or None: the one the model was made for.
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
            guides: what steers the run beside its guidance, as `PAG(3.0)` or "pag:3": see
                `latentdiff.guidance.guides`.
            output_type: see `PipelineOutput.images`.
            callback_on_step_end: see `sample`.
            progress: show a bar on standard error.

        Raises:
            UserError: an argument is out of range; nothing was drawn.
        """
        bundle = self.bundle
        check_name("output type", output_type, get_args(OutputType))
        prompts = check_prompts(prompt)
        per_prompt = whole(num_images_per_prompt, "num_images_per_prompt", 1, MAX_PIXELS)
        negatives = check_negatives(negative_prompt, len(prompts))
        listed(also, "also", "('a hat', 0.7)")
        listed(edits, "edits", "SDEdit(picture, 0.6)")
        listed(guides, "guides", "'pag:3'")
        pictured = picture_size(edits, height, width)
        if pictured is not None:
            height, width = padded_size(pictured, bundle.factor)
        shape = latent_shape(bundle, height, width, len(prompts) * per_prompt)
        steps = whole(num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
        finite(guidance_scale, "guidance_scale")
        finite(guidance_rescale, "guidance_rescale")
        stepper, timetable = run_of(solver, timetable, bundle, steps)
        seeds, indices = picture_streams(seed, first, generator, shape[0])
        noise = NoiseStreams.of(list(zip(seeds, indices, strict=True)))
        x = first_noise(latents, noise, shape, bundle.device)
        own_size = shape[2] * bundle.factor, shape[3] * bundle.factor
        canvas = _canvas(bundle, *(pictured or own_size))
        edits, finish = bind(edits, canvas)

        seen, image_scale = _beside(edits, x)
        guided = guidance_scale != 1 or image_scale != 1
        texts, weights = check_also(also, guided)
        conditions, cut = encode_prompts(
            bundle.text,
            prompts,
            negatives if guided else None,
            per_prompt,
            weights=prompt_weights,
            also=texts,
        )
        steering = resolve(guides, bundle.device)
        spoiling = [guide for guide in steering if isinstance(guide, SpoilsAttention)]
        network, calls = _counted(bundle.network([guide.perturbation for guide in spoiling]))
        heard: list[Tensor] = []
        denoise = conditioned_denoiser(network, bundle.process, bundle.prediction, heard)
        conditions = [mark(each, each is conditions[0]) for each in conditions]
        if spoiling:
            denoise = spoil_attention(denoise, spoiling, shape[0])
        denoise = composed(denoise, list(zip(conditions[2:], weights, strict=True)))
        positive, negative, blind = seeing(conditions, seen)
        denoise = named.create(
            guidance,
            denoise,
            positive,
            negative,
            timetable,
            scale=guidance_scale,
            rescale=guidance_rescale,
            interval=guidance_interval,
            blind=blind,
            image_scale=image_scale,
        )
        said = [without_weights(text) for text in prompts] if prompt_weights else prompts
        scene = Scene([text for text in said for _ in range(per_prompt)], bundle.decode)
        denoise = steer(denoise, steering, scene)
        if bundle.learns_variance:
            denoise = LearnedVarianceDenoiser(denoise, heard)
        undrawn = noise.generators[0].get_state()
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
        drew = not torch.equal(undrawn, noise.generators[0].get_state())
        if drew and not edits and guidance == "cfg++" and 0 < guidance_scale < 1:  # edits draw, too
            warnings.warn(_TOO_MUCH, stacklevel=3)
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
        refinements: int = 1,
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
            refinements: see `latentdiff.diffusion.inversion.invert`.

        Returns:
            [1, C, h, w] float32, about standard noise.

        Raises:
            UserError: no picture, or an argument out of range.
        """
        bundle = self.bundle
        prompts = check_prompts([prompt]) if prompt else [""]
        picture = to_tensor(open_picture(image))[None]
        height, width = picture.shape[-2:]
        canvas = _canvas(bundle, height, width)
        latent_shape(bundle, *canvas.padded, 1)
        steps = whole(num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
        refinements = whole(refinements, "refinements", 0, MAX_STEPS)
        levels = bundle.timetable(timetable, steps)
        stepper = solver_of(solver, bundle)
        conditions, _ = encode_prompts(bundle.text, prompts, None, 1)
        denoise = classifier_free(
            conditioned_denoiser(bundle.network(), bundle.process, bundle.prediction),
            conditions[0],
            None,
            scale=1,
        )
        latents = canvas.latents(picture).to(bundle.device)
        x = invert(denoise, stepper, levels, latents, refinements=refinements)
        return x / bundle.process.prior_scale(levels[0])


def _canvas(bundle: Bundle, height: int, width: int) -> Canvas:
    scale = bundle.vae.config["scaling_factor"]
    return Canvas(height, width, bundle.factor, bundle.encode, bundle.decode, scale)


def _beside(edits: Sequence[Edit], x: Tensor) -> tuple[Tensor | None, float]:
    """What an edit shows the network beside x, and the scale of guidance by it.

    Raises:
        UserError: several edits would.
    """
    showing = [edit for edit in edits if isinstance(edit, EditsInput)]
    if not showing:
        return None, 1.0
    if len(showing) > 1:
        raise UserError("edits: one Inpaint or Instruct is all that a network can be shown.")
    return showing[0].beside(x), showing[0].image_guidance_scale


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
