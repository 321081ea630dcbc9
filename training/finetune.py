"""Fine-tune a model on a folder of your own pictures.

    accelerate launch training/finetune.py --data DIR --method lora

DIR holds pictures and captions (metadata.jsonl, .csv or .parquet, or a .txt beside each picture),
or pictures alone with --instance-prompt; or it is a parquet file, tar shards, or a folder of them.
They are checked before anything starts. OUT then holds the LoRA file (--method lora), or a model
folder in the diffusers layout. Run the same command again to resume.

Methods: lora (a small file beside the model: styles, subjects), dreambooth (one subject, with
--instance-prompt "a sks dog" --prior-prompt "a dog"), textual-inversion (a new word, --token),
full (every weight of the U-Net), controlnet (a network beside the model that holds it to
pictures of edges and such, made out of the training pictures).

Everything else is key=value: optim.accumulation=4, objective.offset_noise=0.1 and so on;
docs/finetune.md has it all.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.data.check import Checked, check_pictures
from latentdiff.data.folder import list_folder
from latentdiff.data.variants import Size, Variant, variants
from latentdiff.diffusion.edits import Edit
from latentdiff.editing import Inpaint
from latentdiff.errors import UserError
from latentdiff.learning.accumulate import in_parts
from latentdiff.learning.captions import Captions, CaptionStates
from latentdiff.learning.checkpoint import Tensors
from latentdiff.learning.command import DryRun, told_in_one_line
from latentdiff.learning.config import override, put, read_yaml
from latentdiff.learning.control_pictures import ControlPictures
from latentdiff.learning.denoising import Conditioned, bound, draw_times, noised_batch, offset_noise
from latentdiff.learning.finetune_config import FinetuneConfig, resolve
from latentdiff.learning.held_out import HeldOut, put_aside
from latentdiff.learning.inpainting_masks import Holes, middle
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.loss_masks import LossMasks
from latentdiff.learning.losses import min_snr_gamma, weighted_loss
from latentdiff.learning.methods import (
    fresh_control,
    make_trainable,
    with_objective,
    without_dropout,
    without_lora,
)
from latentdiff.learning.optimizers import make_optimizer
from latentdiff.learning.order import Key, Stream, columns, generator, spread_uniform
from latentdiff.learning.presets import Method, Preset, prior_captions
from latentdiff.learning.prior_pictures import draw_missing, drawn_from, prior_examples
from latentdiff.learning.results import save_outcome
from latentdiff.learning.run import Run
from latentdiff.learning.samples import Samples, assign_buckets, encode_samples
from latentdiff.learning.tags import check_style, varied
from latentdiff.learning.textual_inversion import check_words
from latentdiff.learning.trained import Trained, averages
from latentdiff.models.control import ControlNetwork
from latentdiff.pictures import centre_square, grid
from latentdiff.pipeline import Control, LatentDiffusionPipeline


def main(
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Picture folder.")] = None,
    method: Annotated[Method | None, typer.Option(help="Method. Default: lora.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id. Default: the bundled model.")
    ] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="Rates and steps to begin with. Default: the model's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: runs/DATA-METHOD.")
    ] = None,
    instance_prompt: Annotated[
        str | None, typer.Option(help="One caption for all pictures, instead of their own.")
    ] = None,
    prior_prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What the model must not unlearn; repeat it, or @FILE, one a line. Default: "
            "captions of what it knows."
        ),
    ] = None,
    token: Annotated[
        list[str] | None, typer.Option(help="Textual inversion: the new word, <my-style>.")
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(help="Textual inversion: a known word to start from.")
    ] = None,
    bad: Annotated[
        str | None, typer.Option(help="Faulty pictures: refuse or skip. Default: refuse.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures per step, in all.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's rank. Default: 16.")] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Of the LoRA file: diffusers, or kohya for ComfyUI and A1111."),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels. Default: the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness. Default: 0.")] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the result at the end.")
    ] = None,
    inpaint: Annotated[
        bool, typer.Option("--inpaint", help="Make an inpainting model of it (not by LoRA).")
    ] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file of the same settings.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Any key, as optim.lr=1e-4.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    # Longer than a screen: a parameter for each option, and a line that says which key it sets.
    with told_in_one_line():
        options: dict[str, object] = {
            "method": method,
            "model": model,
            "preset": preset,
            "out": None if out is None else str(out),
            "seed": seed,
            "inpaint": inpaint or None,
            "data.root": None if data is None else str(data),
            "data.instance_prompt": instance_prompt,
            "data.bad": bad,
            "data.size": size,
            "prior.prompts": prior_prompt,
            "inversion.tokens": token,
            "inversion.start_from": start_from,
            "optim.steps": steps,
            "optim.batch_size": batch_size,
            "optim.lr": lr,
            "lora.rank": rank,
            "lora.layout": layout,
            "card.push_to_hub": push_to_hub,
        }
        values = {} if config is None else read_yaml(config)
        for key, value in options.items():
            if value is not None:
                values = put(values, key, value)
        values = override(values, overrides or [])
        train(resolve(values, "finetune" if config is None else str(config)), dry_run)


main.__doc__ = __doc__


def train(config: FinetuneConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    whole = config.method in ("textual-inversion", "controlnet") or config.optimizer != "adamw"
    with Run(config, dry, may_split=not whole) as run:
        fit(run, Finetuning(config, run))


class Finetuning(Objective[Key]):
    """A model that learns a folder of pictures, and keeps what its prior pictures show."""

    def __init__(self, config: FinetuneConfig, run: Run) -> None:
        self.config, self.run = config, run
        optim = config.optim
        begins = f"learning rate {optim.lr:g}, {optim.steps} steps of {optim.batch_size} pictures"
        run.say(f"preset {config.preset}: {begins}")
        loaded = Bundle.load(config.model, dtype="float32", device=run.device)
        bundle = with_objective(loaded, config.objective)
        gamma = config.objective.min_snr_gamma
        self.within = config.objective.times_min, config.objective.times_max
        self.gamma = min_snr_gamma(gamma, bundle.prediction, bundle.process)
        # draws its own prior pictures, as it is
        samples, held = collect_samples(run, config, loaded)
        self.samples = samples
        self.order = samples.order(config.seed)
        self.bundle = bundle = make_trainable(bundle, config)
        self.masked: list[Image.Image] = []
        self.holes: Holes | None = None
        crops = variants(config.data.crops, config.data.flip)
        if bundle.kind == "inpainting":
            self.holes = Holes(samples.examples, samples.buckets, crops)
            # samples are drawn into these; their files may be gone later
            some = samples.examples[: len(config.sample_prompts) or 8]
            self.masked = [centre_square(example.open(), min(bundle.size)) for example in some]
        self.control = fresh_control(bundle, config) if config.method == "controlnet" else None
        self.control_pictures = self.controls_of(samples, crops)
        self.masks: LossMasks | None = None
        if config.data.mask is not None:
            n, where = samples.count, (config.data.mask, config.data.root, bundle.factor)
            self.masks = LossMasks(samples.examples[:n], samples.buckets[:n], crops, *where)
        self.held = self.hold_out(held)
        encoders = bundle.conditioner.modules.values()
        learns_text = any(p.requires_grad for m in encoders for p in m.parameters())
        priors = len(samples.examples) - samples.count
        self.keeps_predictions = priors > 0 and config.prior.target == "prediction"
        dropout = [config.objective.caption_dropout] * len(samples.examples)
        if self.keeps_predictions:
            dropout[samples.count :] = [config.prior.caption_dropout] * priors
        words, seed, count = config.captions, config.seed, samples.count
        texts = [example.captions for example in samples.examples]
        check_style([text for own in texts[:count] for text in own], words.style)
        texts[:count] = [varied(own, words, seed, n) for n, own in enumerate(texts[:count])]
        self.captions = captions = Captions(bundle.conditioner, texts, dropout, seed, words)
        run.say(*captions.warnings())
        cache = config.out / "cache"
        self.states = None if learns_text else CaptionStates(captions, bundle.conditioner, cache)
        module = Conditioned(bundle, self.control, compiled=config.compile).train()
        self.shown = run.shown(bundle, module)
        make = partial(
            make_optimizer,
            name=config.optimizer,
            optim=config.optim,
            text=list(module.text.parameters()),
            text_lr=config.text_lr,
        )
        averaged = config.optimizer != "schedule-free"
        self.model = Trained("model", module, config.optim, make, averaged=averaged)
        self.trained = [self.model]

    def controls_of(self, samples: Samples, crops: Sequence[Variant]) -> ControlPictures | None:
        """What a ControlNet is shown of the samples, where one is to learn."""
        if self.control is None:
            return None
        config, examples = self.config, samples.examples
        return ControlPictures(examples, samples.buckets, crops, config.control, config.data.root)

    def hold_out(self, held: Samples) -> HeldOut | None:
        """What is measured on the pictures that are put aside, if any are."""
        config, bundle = self.config, self.bundle
        if not held.examples:
            return None
        holes = self.holes and Holes(held.examples, held.buckets, [Variant()])
        controls = self.controls_of(held, [Variant()])
        drawn = config.objective.times, self.within, self.gamma
        return HeldOut(config.held_out, held, bundle, *drawn, holes, controls)

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        bundle, samples, objective = self.bundle, self.samples, self.config.objective
        step, places, numbers = columns(items)
        at, device = (self.config.seed, step, places), self.run.device
        chosen = list(zip(numbers, samples.variants(*at, numbers), strict=True))
        latents, noise = samples.latents(bundle.autoencoder, *at, chosen)
        if objective.offset_noise:
            noise += objective.offset_noise * offset_noise(*at, noise.shape[1])
        latents, noise = latents.to(device), noise.to(device)
        uniform = spread_uniform(*at, self.config.optim.batch_size).to(device)
        t = draw_times(bundle.process, uniform, objective.times, self.within)
        batch = noised_batch(bundle.process, bundle.prediction, latents, noise, t, self.gamma)
        target = batch.target
        beside = None if self.holes is None else self.holes.beside(bundle, *at, chosen)
        hints = None if self.control_pictures is None else self.control_pictures.of(chosen)
        hints = None if hints is None else hints.to(device)
        words = (self.captions.tokens if self.states is None else self.states.of)(*at[1:], numbers)
        random = generator(self.config.seed, Stream.DROPOUT, step, places[0])
        torch.manual_seed(int(random.integers(2**63)))
        prior = torch.tensor([number >= samples.count for number in numbers], device=device)
        if self.keeps_predictions and (self.run.split or prior.any()):
            module = self.model.module
            with torch.no_grad(), without_lora(module), self.run.accelerator.autocast():
                before = module(batch.x, batch.t, words, beside)[:, : latents.shape[1]].float()
            target = torch.where(prior.view(-1, 1, 1, 1), before, target)
        output = self.model.network(batch.x, batch.t, words, beside, pictures=hints)
        weights = batch.weights * samples.weights[numbers].to(device)
        mask = None if self.masks is None else self.masks.of(chosen, latents.shape).to(device)
        predicted = output[:, : latents.shape[1]]
        loss = weighted_loss(predicted, target, weights, objective.huber, mask)
        if not bundle.network.learns_variance:
            return {"loss": loss}
        bits = bound(bundle.process, bundle.prediction, output, latents, noise, t)
        # Nichol & Dhariwal 2021, eq. 16
        return {"loss": loss + objective.bound_weight * bits, "bound": bits.detach()}

    def state(self) -> tuple[dict[str, Tensors], dict[str, object]]:
        tensors, values = ({}, {}) if self.held is None else self.held.state()
        return tensors, {**values, "samples": self.samples.digest}

    def load_state(self, tensors: dict[str, Tensors], values: dict[str, object]) -> None:
        if values["samples"] != self.samples.digest:
            told = "not the pictures and captions that this run began with"
            self.run.say(f"{told}: it goes on with these")
        elif self.held is not None:
            self.held.load_state(tensors, values)

    def begin(self) -> None:
        self.evaluate(0)  # the model as it is before it learns
        self.measure(0)

    def after_step(self, step: int, values: dict[str, Tensor]) -> None:
        held, done = self.held, step + 1
        if held is not None and held.due(done, self.config.optim.steps):
            with averages(self.trained):
                held.note(done, self.measure(done), self.model)

    def measure(self, step: int) -> float:
        """Record the loss of the held-out pictures, the same on every process; 0 without any."""
        if self.held is None:
            return 0.0
        with self.run.accelerator.autocast(), without_dropout(self.bundle):
            found = self.held.loss(self.model.module)
        agreed = self.run.accelerator.reduce(found, "mean")
        assert isinstance(agreed, Tensor)
        loss = agreed.item()
        self.run.record(step, {"held_out": loss})
        return loss

    def stops(self) -> bool:
        return self.held is not None and self.held.is_over

    def evaluate(self, step: int) -> None:
        with self.shown.whole() as bundle:
            if self.run.main:
                self.draw(bundle, step)

    def draw(self, bundle: Bundle, step: int, which: str = "") -> None:
        """Grids at fixed seeds, of captions that are learned and of held-out ones; an inpainting
        model fills the middle of the pictures."""
        learned = self.config.sample_prompts
        learned = learned or [example.captions[0] for example in self.samples.examples[:8]]
        rows = {"samples": learned, "held-out": [] if self.held is None else self.held.captions[:8]}

        def draw(part: Sequence[tuple[str, int]]) -> list[Image.Image]:
            return pictures_of(self.run, bundle, [p for p, _ in part], [s for _, s in part])

        for name, prompts in rows.items():
            # Prompts that are alike, as with one caption for all pictures, show different draws.
            seeds = [self.config.seed + prompts[:n].count(one) for n, one in enumerate(prompts)]
            drawn: list[Image.Image] = []
            if name == "samples" and self.masked:
                for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                    edit = Inpaint(self.masked[number % len(self.masked)], middle(bundle))
                    drawn += pictures_of(self.run, bundle, [prompt], [seed], edits=[edit])
            elif name == "samples" and self.control is not None:
                drawn = self._controlled(bundle, self.control, prompts, seeds)
            elif self.control is None and not self.masked:
                drawn = list(in_parts(list(zip(prompts, seeds, strict=True)), len(prompts), draw))
            if drawn:
                self.run.picture(step, f"{name}{which}", grid(drawn, 8))

    def _controlled(
        self, bundle: Bundle, control: ControlNetwork, prompts: list[str], seeds: list[int]
    ) -> list[Image.Image]:
        """The control pictures of the first samples, each beside what is drawn of it."""
        drawn: list[Image.Image] = []
        assert self.control_pictures is not None
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            picture = self.control_pictures.shown(number % len(self.samples.examples))
            told = [Control(control, picture)]
            drawn += [picture, *pictures_of(self.run, bundle, [prompt], [seed], controls=told)]
        return drawn

    def finish(self) -> None:
        own = self.samples.examples[: self.samples.count]  # without prior pictures
        with ExitStack() as stack:
            best = stack.enter_context(self.held.lent(self.model)) if self.held else None
            bundle = stack.enter_context(self.shown.whole())
            if self.run.main:
                told = "the weights of step {}, whose loss on the held-out pictures was the lowest"
                self.run.say(*([] if best is None else [told.format(best)]))
                if best is not None and best < self.config.optim.steps:
                    self.draw(bundle, best, "-best")
                self.run.say(*save_outcome(bundle, self.config, own, self.control))


def collect_samples(run: Run, config: FinetuneConfig, bundle: Bundle) -> tuple[Samples, Samples]:
    """The folder's pictures, checked, and the model's own; and those held out; all as latents."""
    data = config.data
    size = bundle.size if data.size is None else (data.size, data.size)
    unit = bundle.factor * bundle.network.multiple
    least = min(size) // 2 if data.least_side is None else data.least_side
    where = {key: tuple(values) for key, values in data.where.items()}
    listed = list_folder(data.root, where=where)
    checked = check_pictures(listed, least, prompt=data.instance_prompt, progress=run.main)
    run.say(*(fault.line for fault in checked.faults))
    if checked.must_mend and data.bad == "refuse":
        raise UserError(f"{checked.summary()} cannot be used: mend them, or use --bad skip")
    if not checked.examples:
        raise UserError(f"{data.root}: no picture is left to learn from")
    captions = [caption for example in checked.examples for caption in example.captions]
    check_words(config.inversion.tokens, captions)
    cache = data.latents or config.out / "cache"
    skip, crops = data.bad == "skip", variants(data.crops, data.flip)
    buckets = assign_buckets(checked.sizes, size, unit, data.buckets)
    with run.accelerator.main_process_first():
        samples = encode_samples(bundle.autoencoder, checked, buckets, crops, cache, skip=skip)
    samples, held = samples.parted(put_aside(samples.count, config.held_out.fraction))
    aside = f", and {held.count} held out to measure on (held_out.fraction)" if held.count else ""
    run.say(f"{samples.count} pictures to learn from{aside}")
    prior, prompts = config.prior, prior_prompts(run, config, bundle)
    if not prompts:
        return samples, held
    source = f"{drawn_from(bundle)} {config.seed} {prior.steps} {prior.guidance_scale} {size}"
    count = min(prior.count, 4) if run.dry else prior.count
    examples = prior_examples(config.out / "prior", prompts, count, source)

    draw = partial(
        pictures_of, run, bundle, steps=prior.steps, scale=prior.guidance_scale, size=size
    )
    if run.main:
        drawn = draw_missing(examples, config.seed, draw, progress=True)
        run.say(f"{drawn} prior pictures drawn, {len(examples) - drawn} were there")
    run.accelerator.wait_for_everyone()
    if prior.style is not None:
        styled = [f"{example.captions[0]}, {prior.style}" for example in examples]
        both = zip(examples, styled, strict=True)
        examples = [replace(example, captions=(caption,)) for example, caption in both]
    checked, buckets = Checked(examples, [], []), [size] * len(examples)
    with run.accelerator.main_process_first():
        kept = encode_samples(bundle.autoencoder, checked, buckets, [Variant()], cache)
    return samples.joined(kept, prior.weight), held


def prior_prompts(run: Run, config: FinetuneConfig, bundle: Bundle) -> list[str]:
    """What the model must not unlearn: as the person says, or what is known of the model."""
    named = config.prior.prompts
    if config.method in ("textual-inversion", "controlnet") or named == []:
        return []
    if bundle.kind != "text-to-image":
        if named:
            raise UserError(f"{bundle.name} draws no prior pictures: it is an {bundle.kind} model")
        return []
    if named:
        return named
    prompts, origin = prior_captions(bundle, config.preset)
    told = f"so that what {bundle.name} knows is kept: {len(prompts)} {origin} (prior.prompts)"
    nothing = f"{bundle.name} has no captions.txt that says what it knows, so nothing keeps it"
    run.say(told if prompts else f"{nothing} from unlearning that: --prior-prompt '...'")
    return prompts


def pictures_of(
    run: Run,
    bundle: Bundle,
    prompts: list[str],
    seeds: list[int],
    *,
    steps: int = 20,
    scale: float = 4.0,
    size: Size | None = None,
    edits: Sequence[Edit] = (),
    controls: Sequence[Control] = (),
) -> list[Image.Image]:
    """Draw with the model as it is now; with edits or controls, in the size of their pictures."""
    height, width = (None, None) if edits or controls else size or bundle.size
    with run.accelerator.autocast(), without_dropout(bundle):
        return LatentDiffusionPipeline(bundle)(
            prompts,
            num_inference_steps=steps,
            guidance_scale=scale,
            height=height,
            width=width,
            seed=seeds,
            edits=edits,
            controls=controls,
            progress=False,
        ).images


if __name__ == "__main__":
    typer.run(main)
