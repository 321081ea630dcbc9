"""Stage 2: train the latent denoiser, conditioned on captions by cross-attention.

    accelerate launch training/diffusion.py --config training/configs/emoji64-diffusion.yaml

Reads the autoencoder of stage 1, encodes the pictures once, trains a U-Net and, unless one is
given, a small CLIP text tower of its own along with it (as Rombach et al. 2022, sec. 4.3, do with
theirs). Ends by writing `OUT/model` in the diffusers layout. Run the same command again to resume.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
import typer
from PIL import Image
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example
from latentdiff.data.stream import ShardStream, find_shards
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.prediction import Prediction
from latentdiff.errors import UserError
from latentdiff.formats.check import latent_affine
from latentdiff.formats.diffusers_folder import load_vae
from latentdiff.learning.accumulate import in_parts
from latentdiff.learning.batches import encode_pictures, sample_order, split_examples
from latentdiff.learning.captions import Captions
from latentdiff.learning.card import Outcome, share
from latentdiff.learning.checkpoint import pack_optimizer, unpack_optimizer
from latentdiff.learning.config import DataConfig, RunConfig, Strict, load_config
from latentdiff.learning.denoising import (
    Conditioned,
    Times,
    bound_terms,
    check_learned_variance,
    draw_times,
    noised_batch,
)
from latentdiff.learning.ema import EMA, trained
from latentdiff.learning.losses import min_snr_gamma, weighted_mse
from latentdiff.learning.order import Key, Shares, WindowOrder, sample_noise, spread_uniform
from latentdiff.learning.run import Run, adamw, learning_rate
from latentdiff.learning.streaming import StreamedCaptions, StreamedMoments
from latentdiff.models.attention import set_attention
from latentdiff.models.fresh_text import build_text_encoder, train_tokenizer
from latentdiff.models.text_encoders import ClipTower, TextTower
from latentdiff.models.unet import build_unet
from latentdiff.models.vae import VAE
from latentdiff.pictures import grid
from latentdiff.pipeline import LatentDiffusionPipeline


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


class DiffusionConfig(RunConfig):
    data: DataConfig
    vae: Path
    unet: UNetConfig = UNetConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    shards_at_hand: PositiveInt | None = None  # of data.root, for more than the disk holds
    save_dtype: Literal["float32", "float16"] = "float16"
    sample_prompts: list[str] = Field(default_factory=list)


def main(
    config: Annotated[Path, typer.Option(help="YAML file, see training/configs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value changes, as optim.steps=2000.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read all data, one step, one save, then stop.")
    ] = False,
) -> None:
    """Train a latent diffusion model on captioned pictures; re-run the same command to resume."""
    try:
        train(load_config(DiffusionConfig, config, overrides or []), dry_run)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def train(config: DiffusionConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    with Run(config, dry, may_split=True) as run:
        fit(config, run)


def fit(config: DiffusionConfig, run: Run) -> None:
    """Build -> prepare -> loop -> save."""
    optim, objective = config.optim, config.objective
    process = processes.create(objective.process)
    gamma = min_snr_gamma(objective.min_snr_gamma, objective.prediction, process)
    if objective.learned_variance:
        check_learned_variance(process, objective.times)
    stream = open_stream(config, run)
    examples = split_examples(config.data)[0] if stream is None else stream.of_shard(0)
    count = len(examples) if stream is None else stream.starts[-1]
    run.say(f"{count} pictures for training")

    torch.manual_seed(config.seed)  # the initial weights
    vae = load_vae(config.vae)
    torch.nn.Module.to(vae, run.device)  # diffusers' own `to` has no usable types
    size, factor = config.data.size, 2 ** (len(vae.config["block_out_channels"]) - 1)
    if size % factor:
        raise UserError(f"data.size={size} is no multiple of {factor}, as {config.vae} needs")
    shape = (vae.config["latent_channels"], size // factor, size // factor)
    moments = (
        encode_pictures(vae, examples, size, config.out / "cache", run.accelerator)
        if stream is None
        else StreamedMoments(vae, stream, size, run.device)
    )
    gain, offset = (part.to(run.device) for part in latent_affine(vae))
    bundle = build(config, vae, examples)
    captions = (
        Captions(
            bundle.text, [e.captions for e in examples], objective.caption_dropout, config.seed
        )
        if stream is None
        else StreamedCaptions(bundle.text, stream, objective.caption_dropout, config.seed)
    )
    for line in captions.warnings() if isinstance(captions, Captions) else ():
        run.say(line)

    bundle.text.model.requires_grad_(config.text.train)
    module = Conditioned(bundle.unet, bundle.text)
    optimizer = adamw(iter(trained(module).values()), optim)
    set_attention(bundle.unet, config.unet.backend)
    start = 0
    if found := run.resume():
        module.load_state_dict(found[0]["model"])
    shown = run.shown(bundle, module)
    wrapped, optimizer = run.accelerator.prepare(module, optimizer)
    parameters = list(trained(module).values())
    ema = EMA(module, optim.ema_decay)
    if found:
        tensors, state = found
        ema.load_state_dict(tensors["ema"], int(str(state["ema_updates"])))
        unpack_optimizer(optimizer, tensors["optimizer"])
        start = int(str(state["step"]))
        del found, tensors

    def save(step: int) -> None:
        tensors = {
            "model": module.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": pack_optimizer(optimizer),
        }
        run.save(step, tensors, {"ema_updates": ema.updates})

    stop = min(start + 1, optim.steps) if run.dry else optim.steps
    shares = Shares(
        sample_order(examples, config.data, config.seed)
        if stream is None
        else WindowOrder([s.samples for s in stream.shards], config.seed, stream.keep // 2),
        range(start, stop),
        optim.batch_size,
        run.accelerator.process_index,
        run.accelerator.num_processes,
    )

    def terms(keys: Sequence[Key]) -> dict[str, Tensor]:
        """The loss of a micro-batch, a function of its keys and the weights."""
        step = keys[0][0]
        places = [place for _, place, _ in keys]
        samples = [sample for _, _, sample in keys]
        mean, std = moments[samples].to(run.device).chunk(2, 1)
        posterior, noise = sample_noise(config.seed, step, places, shape, 2).to(run.device)
        latents = (mean + std * posterior - offset) / gain
        uniform = spread_uniform(config.seed, step, places, optim.batch_size).to(run.device)
        t = draw_times(process, uniform, objective.times)
        batch = noised_batch(process, objective.prediction, latents, noise, t, gamma)
        output = wrapped(batch.x, batch.t, captions.tokens(step, places, samples))
        loss = weighted_mse(output[:, : shape[0]], batch.target, batch.weights)
        if not objective.learned_variance:
            return {"loss": loss}
        step_terms = bound_terms(process, objective.prediction, output, latents, noise, t)
        bound = (process.t_max + 1) * step_terms.mean()
        # Nichol & Dhariwal 2021, eq. 16
        return {"loss": loss + objective.bound_weight * bound, "bound": bound.detach()}

    with run.signals(), run.bar(start, stop) as bar:
        for keys in shares:
            rate = learning_rate(optim, keys[0][0])
            values = run.gradients([wrapped], parameters, keys, terms)
            if run.optimize(rate, (optimizer, parameters)):
                ema.update()

            bar.update()
            done = keys[0][0] + 1
            if done % config.log_every == 0 or done == stop:
                losses = {name: value.item() for name, value in values.items()}
                run.record(done, {**losses, "lr": rate})
                bar.set_postfix({"loss": f"{losses['loss']:.4f}", "bad": run.bad_steps})
            if done % config.evaluate_every == 0 or done == stop:
                with ema.applied(), shown.whole() as whole:
                    draw_samples(run, whole, config, examples, done)
            stopping = run.stopping
            if done % config.checkpoint_every == 0 or done == stop or stopping:
                save(done)
            if stopping:
                raise SystemExit(128 + stopping)

    if run.dry:
        run.say("dry run: data, one step and one save are fine")
        return
    with ema.applied(), shown.whole() as whole:
        if run.main:
            save_model(config, whole, examples, None if stream is None else count, run)


def save_model(
    config: DiffusionConfig,
    bundle: Bundle,
    examples: list[Example],
    count: int | None,
    run: Run,
) -> None:
    """The model's folder, with its card; `count` where the examples are only some."""
    folder = config.out / "model"
    bundle.save(folder, dtype=getattr(torch, config.save_dtype))
    run.say(f"wrote {folder}")
    outcome = Outcome(folder, "model", "", examples, config.data.root, count)
    for line in share(outcome, config):
        run.say(line)


def open_stream(config: DiffusionConfig, run: Run) -> ShardStream | None:
    """The shards of `data.root`, if they are to be fetched as they are needed."""
    data = config.data
    if config.shards_at_hand is None:
        return None
    if data.where or data.held_out or data.balance:
        raise UserError(
            "data.where, held_out and balance need all captions: not with shards_at_hand"
        )
    folder = config.out / "shards" / f"process-{run.accelerator.process_index}"
    # a step may reach from one window into the next
    return ShardStream(find_shards(str(data.root)), folder, 2 * config.shards_at_hand)


def build(config: DiffusionConfig, vae: VAE, examples: list[Example]) -> Bundle:
    """The parts of a new model around a trained autoencoder."""
    if config.text.pretrained is None:
        words = sorted({caption for example in examples for caption in example.captions})
        tokenizer = train_tokenizer(words, config.text.vocabulary, config.text.window)
        encoder = build_text_encoder(
            tokenizer, config.text.width, config.text.layers, config.text.heads
        )
        tower: TextTower = ClipTower(encoder, tokenizer)
    else:
        tower = Bundle.load(config.text.pretrained).text
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    unet = build_unet(
        vae.config["latent_channels"],
        config.data.size // factor,
        config.unet.channels,
        config.unet.layers,
        config.unet.attention,
        config.unet.head_dim,
        tower.width,
        config.objective.learned_variance,
    )
    return Bundle(
        vae=vae,
        unet=unet,
        text=tower,
        process=processes.create(config.objective.process),
        prediction=config.objective.prediction,
    )


def draw_samples(
    run: Run, bundle: Bundle, config: DiffusionConfig, examples: list[Example], step: int
) -> None:
    """A grid of pictures at a fixed seed, for the configured prompts or the first captions."""
    if not run.main:
        return
    prompts = config.sample_prompts or [example.captions[0] for example in examples[:16]]
    pipe = LatentDiffusionPipeline(bundle)

    def draw(places: Sequence[int]) -> list[Image.Image]:
        some = [prompts[place] for place in places]
        return pipe(some, seed=config.seed, first=places[0], progress=False).images

    images = list(in_parts(range(len(prompts)), len(prompts), draw))
    run.picture(step, "samples", grid(images, 8))


if __name__ == "__main__":
    typer.run(main)
