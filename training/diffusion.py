"""Stage 2: train the latent denoiser, conditioned on captions by cross-attention.

    accelerate launch training/diffusion.py --config training/configs/emoji64-diffusion.yaml

Reads the autoencoder of stage 1, encodes the pictures once, trains a U-Net and, unless one is
given, a small CLIP text tower of its own along with it (as Rombach et al. 2022, sec. 4.3, do with
theirs). Ends by writing `OUT/model` in the diffusers layout. Run the same command again to resume.

With `data.low_resolution` the network learns to enlarge pictures of that size to `data.size`, which
it sees beside x_t, as the later stages of a cascade do (`latentdiff enlarge` draws with it). With
`haar` in place of `vae` it denoises pixels: a wavelet transform stands for the autoencoder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import typer
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example, load_picture
from latentdiff.data.stream import ShardStream, find_shards
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.prediction import Prediction
from latentdiff.editing import Enlarge
from latentdiff.errors import UserError
from latentdiff.formats.autoencoder_files import load_autoencoder
from latentdiff.formats.scheduler_steps import usual_steps
from latentdiff.learning.batches import encode_pictures, sample_order, split_examples, to_range
from latentdiff.learning.captions import Captions
from latentdiff.learning.card import Outcome, share
from latentdiff.learning.command import ConfigFile, DryRun, Overrides, told_in_one_line
from latentdiff.learning.config import DataConfig, RunConfig, Strict, load_config
from latentdiff.learning.denoising import (
    Conditioned,
    Times,
    bound,
    check_learned_variance,
    draw_times,
    noised_batch,
)
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.losses import min_snr_gamma, weighted_mse
from latentdiff.learning.low_resolution import Pairs
from latentdiff.learning.order import Key, WindowOrder, columns, sample_noise, spread_uniform
from latentdiff.learning.run import Run
from latentdiff.learning.sample_grid import sample_grid
from latentdiff.learning.streaming import StreamedCaptions, StreamedMoments
from latentdiff.learning.trained import Trained
from latentdiff.models.attention import set_attention
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.conditioner import Conditioner, TextConditioner
from latentdiff.models.fresh_text import build_text_encoder, train_tokenizer
from latentdiff.models.haar import MOST_LEVELS, fitted_transform
from latentdiff.models.network import DiffusersUNet, LowResolution, UpscalingUNet
from latentdiff.models.text_encoders import ClipTower
from latentdiff.models.unet import build_unet
from latentdiff.pictures import grid, to_pil
from latentdiff.pipeline import LatentDiffusionPipeline

_FITTED = 256  # pictures that a wavelet transform has its statistics of


class UNetConfig(Strict):
    channels: tuple[PositiveInt, ...] = (128, 256)
    layers: PositiveInt = 1
    attention: tuple[bool, ...] = (True, True)
    head_dim: PositiveInt = 64
    backend: Literal["auto", "eager", "sdpa", "xformers"] = "auto"

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if len(self.channels) != len(self.attention):
            raise ValueError(
                f"channels has {len(self.channels)} levels and attention {len(self.attention)}"
            )
        if any(width % 32 or width == 32 for width in self.channels):
            # A norm of 32 groups, each of one channel, subtracts the time embedding again.
            raise ValueError(
                "channels must be multiples of 32, 64 or more: a level of 32 would not see the time"
            )
        return self


class TextConfig(Strict):
    """A fresh tower's shape; or `pretrained`, the folder of a model whose tower is used."""

    pretrained: Path | None = None
    train: bool = True
    vocabulary: int = Field(default=3072, ge=514)  # every byte, twice
    window: PositiveInt = 24
    width: PositiveInt = 192
    layers: PositiveInt = 3
    heads: PositiveInt = 3

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width={self.width}")
        return self


class ObjectiveConfig(Strict):
    process: str = "vp-scaled-linear"
    prediction: Prediction = "v"
    times: Times = "uniform"
    min_snr_gamma: PositiveFloat | Literal["auto"] | None = "auto"
    caption_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    learned_variance: bool = False
    bound_weight: PositiveFloat = 0.001


class LargeConfig(DataConfig):
    """Pictures, and for a network that enlarges them the size of what it is shown."""

    low_resolution: PositiveInt | None = None
    max_noise_level: int = Field(default=350, ge=0, lt=1000)  # of what is shown, of 1000
    residual: bool = False  # whether it learns what Lanczos's enlargement lacks


class DiffusionConfig(RunConfig):
    data: LargeConfig
    vae: Path | None = None
    haar: int | None = Field(default=None, ge=0, le=MOST_LEVELS)
    unet: UNetConfig = UNetConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    compile: bool = False  # by torch.compile, which takes a minute or two at the first step
    shards_at_hand: PositiveInt | None = None  # of data.root, for more than the disk holds
    save_dtype: Literal["float32", "float16"] = "float16"
    sample_prompts: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _pictures_are_encoded(self) -> Self:
        if (self.vae is None) == (self.haar is None):
            raise ValueError("give vae, the folder of an autoencoder, or haar, levels; one of them")
        small, data = self.data.low_resolution, self.data
        if small is None:
            for key in {"max_noise_level", "residual"} & data.model_fields_set:
                raise ValueError(f"data.{key} is of data.low_resolution: give both")
            return self
        if data.size % small or data.size == small:
            raise ValueError(f"data.low_resolution={small} must divide data.size={data.size}")
        if self.shards_at_hand is not None or data.latents is not None:
            raise ValueError(
                "data.low_resolution shows pictures, which are kept in memory: not with "
                "shards_at_hand or data.latents"
            )
        return self


def main(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a latent diffusion model on captioned pictures; re-run the same command to resume."""
    with told_in_one_line():
        train(load_config(DiffusionConfig, config, overrides or []), dry_run)


def train(config: DiffusionConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    with Run(config, dry, may_split=True) as run:
        fit(run, Denoising(config, run))


class Denoising(Objective[Key]):
    """A U-Net that denoises latents, with a text tower that may learn along."""

    def __init__(self, config: DiffusionConfig, run: Run) -> None:
        objective, size, seed = config.objective, config.data.size, config.seed
        self.config, self.run = config, run
        self.process = processes.create(objective.process)
        self.gamma = min_snr_gamma(objective.min_snr_gamma, objective.prediction, self.process)
        if objective.learned_variance:
            check_learned_variance(self.process, objective.times)
        self.stream = stream = open_stream(config, run)
        self.examples = split_examples(config.data)[0] if stream is None else stream.of_shard(0)
        count = len(self.examples) if stream is None else stream.starts[-1]
        run.say(f"{count} pictures for training")

        torch.manual_seed(seed)  # the initial weights
        self.autoencoder = autoencoder = open_autoencoder(config, self.examples)
        torch.nn.Module.to(autoencoder.module, run.device)  # diffusers' own `to` has no types
        factor = autoencoder.factor
        if size % factor:
            where = config.vae or f"haar={config.haar}"
            raise UserError(f"data.size={size} is no multiple of {factor}, as {where} needs")
        self.latent_shape = (autoencoder.channels, size // factor, size // factor)
        bundle = build(config, autoencoder, self.examples, size // factor)
        self.low, self.pairs = bundle.network.low_resolution, None
        dropout = objective.caption_dropout
        if stream is None:
            if config.data.low_resolution is not None:
                self.pairs = Pairs(self.examples, size, config.data.low_resolution)
            else:
                cache = config.data.latents or config.out / "cache"
                accelerator = run.accelerator
                self.moments = encode_pictures(autoencoder, self.examples, size, cache, accelerator)
            self.order = sample_order(self.examples, config.data, seed)
            texts = [example.captions for example in self.examples]
            self.captions = Captions(bundle.conditioner, texts, dropout, seed)
            run.say(*self.captions.warnings())
        else:
            self.moments = StreamedMoments(autoencoder, stream, size)
            counts = [shard.samples for shard in stream.shards]
            self.order = WindowOrder(counts, seed, stream.keep // 2)
            self.captions = StreamedCaptions(bundle.conditioner, stream, dropout, seed)
        for encoder in bundle.conditioner.modules.values():
            encoder.requires_grad_(config.text.train)
        set_attention(bundle.network.module, config.unet.backend)
        module = Conditioned(bundle, compiled=config.compile)
        self.shown = run.shown(bundle, module)
        self.model = Trained("model", module, config.optim)
        self.trained = [self.model]

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        process, objective = self.process, self.config.objective
        step, places, samples = columns(items)
        at, device = (self.config.seed, step, places), self.run.device
        posterior, noise = sample_noise(*at, self.latent_shape, 2).to(device)
        moments, shown = self.moments_of(step, places, samples)
        latents = self.autoencoder.draw(moments.to(device), posterior)
        uniform = spread_uniform(*at, self.config.optim.batch_size).to(device)
        t = draw_times(process, uniform, objective.times)
        batch = noised_batch(process, objective.prediction, latents, noise, t, self.gamma)
        words = self.captions.tokens(step, places, samples)
        output = self.model.network(batch.x, batch.t, words, **shown)
        loss = weighted_mse(output[:, : latents.shape[1]], batch.target, batch.weights)
        if not objective.learned_variance:
            return {"loss": loss}
        bits = bound(process, objective.prediction, output, latents, noise, t)
        # Nichol & Dhariwal 2021, eq. 16
        return {"loss": loss + objective.bound_weight * bits, "bound": bits.detach()}

    def moments_of(
        self, step: int, places: list[int], samples: list[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The moments of some samples [b, 2C, h, w], and what the network is shown beside x_t."""
        if self.pairs is None or self.low is None:
            return self.moments[samples], {}
        pairs, residual = self.pairs, self.low.residual
        large = pairs.residuals(samples) if residual else pairs.pictures(samples)
        moments = self.autoencoder.moments(large)
        at = self.config.seed, step, places, samples
        small, levels = self.pairs.shown(self.low, *at, self.latent_shape[1:])
        device = self.run.device
        return moments, {"beside": small.to(device), "noise_level": levels.to(device)}

    def evaluate(self, step: int) -> None:
        """A grid of pictures at a fixed seed, for the configured prompts or the first captions."""
        with self.shown.whole() as bundle:
            if not self.run.main:
                return
            if self.pairs is not None:
                self.run.picture(step, "samples", self.enlarged(bundle, self.pairs))
                return
            config = self.config
            drawn = sample_grid(bundle, config.sample_prompts, self.examples, config.seed)
            self.run.picture(step, "samples", drawn)

    def enlarged(self, bundle: Bundle, pairs: Pairs) -> Image.Image:
        """Some small pictures, what becomes of each, and the large ones."""
        pipe = LatentDiffusionPipeline(bundle)
        rows: list[Image.Image] = []
        for number in range(0, len(pairs.large), max(1, len(pairs.large) // 8)):
            small = to_pil(to_range(pairs.small[number]))
            large = to_pil(to_range(pairs.large[number]))
            options = {"guidance_scale": 1.0, "num_inference_steps": 8, "progress": False}
            drawn = pipe("", edits=[Enlarge(small)], seed=self.config.seed, **options).images[0]
            rows += [small.resize(large.size, Image.Resampling.LANCZOS), drawn, large]
        return grid(rows, 6)

    def finish(self) -> None:
        """Write the model's folder, with its card."""
        folder, config = self.run.out / "model", self.config
        with self.shown.whole() as bundle:
            if not self.run.main:
                return
            bundle.save(folder, dtype=getattr(torch, config.save_dtype))
            self.run.say(f"wrote {folder}")
        count = None if self.stream is None else self.stream.starts[-1]
        ratio = None if self.low is None else self.low.ratio
        root = config.data.root
        outcome = Outcome(folder, "model", "", self.examples, root, count, enlarges=ratio)
        self.run.say(*share(outcome, config))


def open_autoencoder(config: DiffusionConfig, examples: Sequence[Example]) -> Autoencoder:
    """The autoencoder of stage 1, or a wavelet transform with the statistics of some pictures."""
    if config.vae is not None:
        return load_autoencoder(config.vae)
    assert config.haar is not None
    every = max(1, len(examples) // _FITTED)
    size = config.data.size // 2**config.haar * 2**config.haar
    few = examples[::every][:_FITTED]
    if config.data.low_resolution is not None and config.data.residual:
        pairs = Pairs(few, size, config.data.low_resolution)
        return fitted_transform(config.haar, [pairs.residuals([n]) for n in range(len(few))])
    some = (load_picture(example, max(size, 1)) for example in few)
    return fitted_transform(config.haar, [to_range(picture)[None] for picture in some])


def open_stream(config: DiffusionConfig, run: Run) -> ShardStream | None:
    """The shards of `data.root`, if they are to be fetched as they are needed."""
    data = config.data
    if config.shards_at_hand is None:
        return None
    if data.where or data.held_out or data.balance:
        raise UserError(
            "data.where, held_out and balance need all captions: not with shards_at_hand"
        )
    if data.latents is not None:
        raise UserError("data.latents are held in memory: not with shards_at_hand")
    folder = config.out / "shards" / f"process-{run.accelerator.process_index}"
    # a step may reach from one window into the next
    return ShardStream(find_shards(str(data.root)), folder, 2 * config.shards_at_hand)


def build(
    config: DiffusionConfig, autoencoder: Autoencoder, examples: list[Example], side: int
) -> Bundle:
    """The parts of a new model around a trained autoencoder, for latents of side x side."""
    if config.text.pretrained is None:
        words = sorted({caption for example in examples for caption in example.captions})
        tokenizer = train_tokenizer(words, config.text.vocabulary, config.text.window)
        encoder = build_text_encoder(
            tokenizer, config.text.width, config.text.layers, config.text.heads
        )
        conditioner: Conditioner = TextConditioner(ClipTower(encoder, tokenizer))
    else:
        conditioner = Bundle.load(config.text.pretrained, dtype="float32").conditioner
    unet = build_unet(
        autoencoder.channels,
        side,
        config.unet.channels,
        config.unet.layers,
        config.unet.attention,
        config.unet.head_dim,
        conditioner.width,
        config.objective.learned_variance,
        config.data.low_resolution is not None,
    )
    if (small := config.data.low_resolution) is None:
        network = DiffusersUNet(unet, autoencoder.channels)
    else:
        ratio, noising = config.data.size // small, processes.create("vp-linear")
        if ratio % autoencoder.factor:
            raise UserError(
                f"data.low_resolution={small} is {ratio} times smaller than data.size, which must "
                f"be a multiple of the autoencoder's factor, {autoencoder.factor}"
            )
        most, residual = config.data.max_noise_level, config.data.residual
        made = LowResolution(noising, most, ratio, residual)
        network = UpscalingUNet(unet, autoencoder.channels, made)
    process = processes.create(config.objective.process)
    return Bundle(
        autoencoder=autoencoder,
        conditioner=conditioner,
        network=network,
        process=process,
        prediction=config.objective.prediction,
        steps=usual_steps(process),
    )


if __name__ == "__main__":
    typer.run(main)
