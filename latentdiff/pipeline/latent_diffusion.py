"""Words in, pictures out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, get_args

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff import lora
from latentdiff.bundle import Bundle, Precision
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import bind, conditioned_denoiser
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.inversion import invert
from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.sampling import Callback
from latentdiff.diffusion.solver import Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import RunContext
from latentdiff.errors import UserError, warn
from latentdiff.formats import scheduler_config
from latentdiff.formats.embeddings import read_words
from latentdiff.formats.location import find_file
from latentdiff.guidance.methods import Method
from latentdiff.models.attention import Attention
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.engines import Engine
from latentdiff.models.guidance_embedding import told_scale
from latentdiff.models.learned_words import with_words
from latentdiff.models.preview import check_same_latents, preview
from latentdiff.models.text_encoders import ClipTower
from latentdiff.models.tiling import Tiling
from latentdiff.pictures import Picture, open_picture, to_pil, to_tensor
from latentdiff.pipeline.arguments import MAX_STEPS, check_levels, latent_shape, solver_of, whole
from latentdiff.pipeline.controls import Control
from latentdiff.pipeline.diffusers_names import (
    DiffusersNames,
    StepEnd,
    answering,
    check_step_inputs,
    latents_of,
)
from latentdiff.pipeline.few_steps import hastened
from latentdiff.pipeline.image_prompts import ImagePrompt
from latentdiff.pipeline.output import OutputType, PipelineOutput
from latentdiff.pipeline.preparation import prepare, warn_of_size
from latentdiff.pipeline.prompt_syntax import Syntax
from latentdiff.pipeline.prompts import Also, check_prompts, encode_prompts
from latentdiff.pipeline.request import Request
from latentdiff.pipeline.run import Run
from latentdiff.registry import check_name


class LatentDiffusionPipeline(DiffusersNames):
    """A model, ready to draw. It keeps nothing between calls, so threads may share it.

    A LoRA is a property of the model: `load_lora`, `set_loras` and `remove_lora` must not be called
    while another thread draws.

    Args:
        bundle: the model.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.bundle.about})"

    @classmethod
    @answering
    def from_pretrained(
        cls,
        where: str | Path | None = None,
        *,
        vae: str | Path | None = None,
        prediction: Prediction | None = None,
        variant: str | None = None,
        dtype: Precision | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attention: Attention = "auto",
        engine: Engine = "auto",
        tiling: Tiling = "auto",
        fast: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a model, to draw fast with: see `Bundle.load`. `torch_dtype` is diffusers' `dtype`.

        Args:
            fast: draw in 4 steps without guidance where a call does not say how many, by the LoRA
                that the model's folder carries for that: see `latentdiff.pipeline.few_steps`.

        Raises:
            UserError: it is missing, damaged or unfit; or it has no such LoRA.
        """
        if torch_dtype is not None:
            if dtype not in ("auto", torch_dtype):
                raise UserError("dtype and torch_dtype: give one of them, not both.")
            dtype = torch_dtype
        bundle = Bundle.load(
            where,
            vae=vae,
            prediction=prediction,
            variant=variant,
            dtype=dtype,
            device=device,
            attention=attention,
            engine="eager" if fast else engine,
            tiling=tiling,
        )
        return cls(hastened(bundle, where).inside(engine) if fast else bundle)

    from_single_file = from_pretrained  # diffusers' name of it for one file

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
        return scheduler_config.to_object(
            described, learned_variance=bundle.network.learns_variance
        )

    @scheduler.setter
    def scheduler(self, scheduler: object) -> None:
        process, prediction, steps, solver = scheduler_config.read_object(scheduler)
        self.bundle = replace(
            self.bundle, process=process, prediction=prediction, steps=steps, solver=solver
        )

    def load_lora(self, path: str | Path, scale: float = 1.0, name: str | None = None) -> str:
        """Put a LoRA into the model, beside those that are in it.

        Args:
            path: a .safetensors file in a layout of `docs/models.md`, or a folder with
                `pytorch_lora_weights.safetensors`.
            scale: its strength.
            name: for `set_loras` and `remove_lora`; by default the file's.

        Returns:
            The name.

        Raises:
            UserError: no such file, no LoRA for this model, or the name is taken; nothing changed.
        """
        name = lora.default_name(path) if name is None else name
        found = lora.load_lora(path, self.bundle)
        lora.attach_lora(self.bundle, found, name, scale)
        if found.words:
            warn(
                f"{path}: it also holds the learned words {', '.join(found.words)}, which were "
                "left out; load_textual_inversion (--embedding on the command line) reads them."
            )
        return name

    def load_lora_weights(
        self,
        pretrained_model_name_or_path: str | Path,
        *,
        weight_name: str | None = None,
        adapter_name: str | None = None,
    ) -> None:
        """Put a LoRA into the model at strength 1, by diffusers' names: see `load_lora`.

        Args:
            pretrained_model_name_or_path: the file, or its folder.
            weight_name: name of the file in the folder.
            adapter_name: for `set_loras` and `remove_lora`; by default the file's.

        Raises:
            UserError: see `load_lora`.
        """
        path = Path(pretrained_model_name_or_path)
        self.load_lora(path / weight_name if weight_name else path, name=adapter_name)

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
            UserError: no LoRA is attached, or a sum is not finite.
        """
        return lora.fused(self.bundle)

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """Teach the model the words of a file, to be used in prompts as they are spelled.

        Args:
            path: `learned_embeds.safetensors`, an embedding of A1111 or ComfyUI (of Stable
                Diffusion XL `clip_l` and `clip_g` in one file), a LoRA file with words packed in,
                or a folder with `learned_embeds.safetensors`.
            token: another name for the word of a file of one.

        Returns:
            The words.

        Raises:
            UserError: no such file, none of this model, no CLIP text encoder, or the model has a
                word already; nothing changed.
        """
        conditioner, towers = self.bundle.conditioner, self.bundle.conditioner.towers
        clips = {name: tower for name, tower in towers.items() if isinstance(tower, ClipTower)}
        if len(clips) < len(towers):
            raise UserError("only a model with CLIP text encoders takes learned words.")
        file = find_file(path, "file of learned words")
        if file.is_dir():
            file = find_file(file / "learned_embeds.safetensors", "file of learned words")
        words = read_words(file, {name: tower.width for name, tower in clips.items()})
        if token is not None:
            if len(words) > 1:
                raise UserError(f"{file}: it holds several words, which one token cannot name.")
            words = dict(zip([token], words.values(), strict=True))
        taught = {
            name: with_words(tower, {word: rows[name] for word, rows in words.items()})
            for name, tower in clips.items()
        }
        self.bundle = replace(self.bundle, conditioner=conditioner.with_towers(taught))
        return list(words)

    def prepare(self, request: Request) -> Run:
        """Check the arguments of a call and encode its prompts; nothing is drawn yet.

        `run.steps()` makes the moves one by one, `run.finish()` what is left of them.

        Raises:
            UserError: an argument is out of range.
        """
        with torch.no_grad():
            return prepare(self.bundle, request)

    @answering
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        prompt_embeds: Tensor | Condition | None = None,
        negative_prompt_embeds: Tensor | Condition | None = None,
        also: Sequence[Also] = (),
        prompt_weights: bool = False,
        long_prompts: bool = False,
        prompt_syntax: Syntax = "plain",
        clip_skip: int | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        num_inference_steps: int | None = None,
        guidance: str | Method = "cfg",
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        solver: str | Solver | None = None,
        timetable: str | Timetable | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        first: int = 0,
        variation_seed: int | Sequence[int] | None = None,
        variation_strength: float = 0.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        edits: Sequence[Edit | str] = (),
        controls: Sequence[Control] = (),
        image_prompts: Sequence[ImagePrompt] = (),
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        on_move: Callback | None = None,
        progress: bool = True,
    ) -> PipelineOutput:
        """Draw.

        Args:
            prompt: what to draw; several draw several, in their order.
            negative_prompt: what to steer away from, for all prompts or one for each.
            prompt_embeds: in place of prompts, their states [P, L, D], or a whole `Condition`.
            negative_prompt_embeds: likewise, of one row or P.
            also: further prompts for every picture and their weights beside the prompt's 1, as
                ("a hat", 0.7) or "a hat:0.7"; or, in a part of the picture, ("a hat", mask) or
                ("a hat", 0.7, mask); see `latentdiff.guidance.composition`.
            prompt_weights: read (x), (x:1.3) and [x] in all prompts as weights of their words.
            long_prompts: read prompts longer than the window in chunks, which the word BREAK ends,
                too: see `latentdiff.models.long_prompts`.
            prompt_syntax: "a1111" reads prompts as A1111 does: weights (by its rule, or with
                `prompt_weights` by ours), long prompts, AND, words that change from step to step,
                `<lora:NAME:SCALE>`: see `docs/prompts.md`.
            clip_skip: how many of the text encoder's last layers are left out, counted as diffusers
                does: 1 is "Clip skip 2" elsewhere.
            height: in pixels, a multiple of the autoencoder's factor; by default the model's own.
            width: likewise.
            original_size: what a network of Stable Diffusion XL is told of the pictures: see
                `latentdiff.models.conditioner.SizeConditions`, for this and the next four.
            crop: top and left of what was cut out.
            target_size: height and width.
            aesthetic_score: of a refiner.
            negative_aesthetic_score: likewise, of what guidance leads away from.
            num_inference_steps: 1 .. 1000. None is the model's own number: 20, or 4 with `fast`.
            guidance: "cfg", "apg" or "cfg++"; or a method of one's own, as
                `partial(guidance.projected, momentum=-0.5)`: see `latentdiff.guidance.methods`.
            guidance_scale: its strength; 1 is off ("cfg++" takes 0 .. 1). None is the model's
                own, 1 with `fast`, or else the method's: 4, of "cfg++" 0.6.
            guidance_rescale: see `classifier_free`.
            guidance_interval: guide only where sigma / alpha lies above the first number and up to
                the second.
            solver: a name of `solvers.names()`, or another tool's, as "DPM++ 2M Karras"; a solver;
                or None: the one the model was made for.
            timetable: a name of `timetable.names()`, levels from noise to data, or None: the
                timetable the model was made for.
            num_images_per_prompt: number of pictures of each prompt; they follow one another.
            seed: seed of the noise; picture i of a seed is the same in every batch. A sequence
                names a seed for each picture. None or -1 takes a fresh one, which the output tells.
            first: index of the first picture within its seed.
            variation_seed: seed of the first picture's variation, that of the next one higher, and
                so on; a sequence names one for each. None or -1 takes a fresh one, which the
                output tells.
            variation_strength: 0..1, how far the first noise is turned towards that of the
                variation's seed, as A1111's "variation strength". Above 0 all pictures of a seed
                vary picture `first` of it.
            generator: where the seed is drawn from, instead of `seed`.
            latents: [B, C, height / factor, width / factor] standard noise to begin with.
            edits: what steers the run: `latentdiff.editing`, the guides of `latentdiff.guidance`
                (`PAG(3.0)`, or in words "pag:3"), or any that `sample` takes. The pictures they
                hold give the size of the run: height and width are then left out, and sides that
                are no multiple of the autoencoder's factor are padded and cropped.
            controls: pictures that ControlNets hold the run to: `Control(folder, picture)`; they
                add up, and go with every solver, guidance and edit.
            image_prompts: pictures that are drawn after, by IP-Adapters, as `ImagePrompt(file,
                picture)`; they add up, and go with every solver, guidance and edit, too.
            output_type: see `PipelineOutput.images`.
            return_dict: of diffusers; either way the output is also the pair (images, None).
            callback_on_step_end: called after every step as by diffusers, with the pipeline, the
                step's index, the time it began at and {"latents": x}; x of what it returns goes on.
            callback_on_step_end_tensor_inputs: of those that diffusers knows, "latents" alone.
            on_move: called after every step with its index, the level reached and x [B, C, h, w];
                a tensor that it returns goes on in place of x.
            progress: show a bar on standard error.

        Raises:
            UserError: an argument is out of range; nothing was drawn.
        """
        steps, scale = self.bundle.settings(num_inference_steps, guidance, guidance_scale)
        request = Request(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            also=also,
            prompt_weights=prompt_weights,
            long_prompts=long_prompts,
            prompt_syntax=prompt_syntax,
            clip_skip=clip_skip,
            height=height,
            width=width,
            original_size=original_size,
            crop=crop,
            target_size=target_size,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            num_inference_steps=steps,
            guidance=guidance,
            guidance_scale=scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            solver=solver,
            timetable=timetable,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            first=first,
            variation_seed=variation_seed,
            variation_strength=variation_strength,
            generator=generator,
            latents=latents,
            edits=edits,
            controls=controls,
            image_prompts=image_prompts,
        )
        del return_dict  # either way the output has both forms
        return self.draw(
            request,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            on_move=on_move,
            progress=progress,
        )

    def draw(
        self,
        request: Request,
        *,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        on_move: Callback | None = None,
        progress: bool = True,
    ) -> PipelineOutput:
        """Draw what a request says: the call itself, with its arguments as a value.

        Raises:
            UserError: an argument is out of range; nothing was drawn. Or a callback returned what
                cannot be changed.
        """
        check_name("output type", output_type, get_args(OutputType))
        if callback_on_step_end is not None:
            check_step_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        run = self.prepare(request)
        for move in tqdm(run.steps(), total=len(run), disable=not progress, leave=False):
            if on_move is not None:
                replaced = on_move(move.index, move.level, move.x)
                run.latents = run.latents if replaced is None else replaced
            if callback_on_step_end is not None:
                began = torch.tensor(run.levels[move.index].t)
                given = {"latents": run.latents}
                returned = callback_on_step_end(self, move.index, began, given)
                run.latents = latents_of(returned, run.latents)
        return run.finish(output_type)

    def preview(self, latents: Tensor, *, by: Autoencoder | None = None) -> list[Image.Image]:
        """Show what latents look like, quickly, as in a callback: one pixel for each latent.

        `Run.preview(quick=True)` shows a run's present estimate of the picture, in its size.

        Args:
            latents: [B, C, h, w], as a callback is given them.
            by: instead of that, decode them with this autoencoder, as a tiny one that
                `latentdiff.load_autoencoder` read.

        Raises:
            UserError: `by` is of other latents.
        """
        if by is not None:
            check_same_latents(by, self.bundle.autoencoder)
            with torch.no_grad():
                return [to_pil(picture) for picture in by.decode(latents)]
        return [to_pil(small) for small in preview(self.bundle.autoencoder, latents)]

    @torch.no_grad()
    def invert(
        self,
        image: Picture,
        prompt: str = "",
        *,
        num_inference_steps: int = 50,
        solver: str | Solver = "heun",
        timetable: str | Timetable = "karras",
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
            timetable: one that ends near the data; or levels, which `num_inference_steps` is not
                for: the last of a run's invert a picture to where these begin.
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
        context = RunContext(height, width, bundle.autoencoder, prompts, bundle.process)
        latent_shape(bundle, *context.padded, 1)
        warn_of_size(bundle, 1, height, width)
        steps = whole(num_inference_steps, "num_inference_steps", 1, MAX_STEPS)
        refinements = whole(refinements, "refinements", 0, MAX_STEPS)
        levels = timetable
        if isinstance(levels, str):
            levels = bundle.timetable(levels, steps)
        check_levels(levels)
        stepper = solver_of(solver, bundle)
        (condition,), _ = encode_prompts(bundle.conditioner, [prompts], 1, context.padded)
        condition = told_scale(condition, bundle.network, 1.0)
        conditioned = conditioned_denoiser(bundle.network, bundle.process, bundle.prediction)
        denoise = bind(conditioned, condition)
        latents = context.latents(picture).to(bundle.device)
        x = invert(denoise, stepper, levels, latents, refinements=refinements)
        return x / bundle.process.prior_scale(levels[0])
