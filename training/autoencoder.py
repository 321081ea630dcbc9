"""Stage 1: train the autoencoder.

    accelerate launch training/autoencoder.py --config training/configs/emoji64-autoencoder.yaml

L1 + perceptual + KL or VQ, and from `loss.adversarial_start` on a hinge patch-adversarial term with
adaptive weight (Esser et al. 2021, eq. 6-7; Rombach et al. 2022, appendix G). Ends by measuring the
latents and writing `OUT/vae` in the diffusers layout. Run the same command again to resume.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
import typer
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from tqdm import tqdm

from latentdiff.data.examples import Example
from latentdiff.errors import UserError
from latentdiff.formats.diffusers_save import save_network
from latentdiff.learning.batches import (
    PictureSet,
    sample_order,
    shares_of_pictures,
    split_examples,
    to_range,
)
from latentdiff.learning.checkpoint import pack_optimizer, unpack_optimizer
from latentdiff.learning.config import DataConfig, RunConfig, Strict, load_config
from latentdiff.learning.ema import EMA
from latentdiff.learning.losses import adaptive_weight, discriminator_hinge
from latentdiff.learning.order import Key, Shares, sample_noise
from latentdiff.learning.run import Run, adamw, learning_rate
from latentdiff.metrics.perceptual import create as perceptual_distance
from latentdiff.metrics.psnr import psnr
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.models.vae import (
    VAE,
    AutoencoderKL,
    Autoencoding,
    build_vae,
    encode_moments,
    standardise_latents,
)
from latentdiff.pictures import grid, to_pil


class ModelConfig(Strict):
    kind: Literal["kl", "vq"] = "kl"
    channels: tuple[PositiveInt, ...] = (32, 64, 96, 128)
    layers: PositiveInt = 1
    latent_channels: PositiveInt = 16
    norm_groups: PositiveInt = 8
    codes: PositiveInt = 1024

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if any(width % self.norm_groups for width in self.channels):
            raise ValueError(f"norm_groups={self.norm_groups} does not divide all of the channels")
        return self


class LossConfig(Strict):
    l1: float = 1.0
    perceptual: float = 0.1
    perceptual_features: str = "random"
    regulariser: float = 1e-6
    adversarial: float = 0.0
    adversarial_start: float = Field(default=0.75, ge=0.0, le=1.0)


class AutoencoderConfig(RunConfig):
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()

    @model_validator(mode="after")
    def _size_halves(self) -> Self:
        factor = 2 ** (len(self.model.channels) - 1)
        if self.data.size % factor:
            raise ValueError(
                f"data.size={self.data.size} is no multiple of {factor}, by which "
                f"{len(self.model.channels)} model.channels reduce it"
            )
        return self


class Losses:
    """The terms of the autoencoder's loss but for the adversarial one."""

    def __init__(self, config: AutoencoderConfig, device: torch.device) -> None:
        self.weights = config.loss
        self.start = int(config.loss.adversarial_start * config.optim.steps)
        self.distance = perceptual_distance(config.loss.perceptual_features).to(device)

    def adversarial_on(self, step: int) -> bool:
        """Whether the discriminator takes part at this step."""
        return self.weights.adversarial > 0.0 and step >= self.start

    def __call__(self, real: Tensor, fake: Tensor, regulariser: Tensor) -> dict[str, Tensor]:
        """Scalars: each term, and "loss", their weighted sum, with its graph."""
        l1 = F.l1_loss(fake, real)
        perceptual = self.distance(fake, real).mean()
        weights = self.weights
        loss = weights.l1 * l1 + weights.perceptual * perceptual + weights.regulariser * regulariser
        return {"loss": loss, "l1": l1, "perceptual": perceptual, "regulariser": regulariser}


def main(
    config: Annotated[Path, typer.Option(help="YAML file, see training/configs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value changes, as optim.steps=2000.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read all data, one step, one save, then stop.")
    ] = False,
) -> None:
    """Train an autoencoder on a folder of pictures; re-run the same command to resume."""
    try:
        train(load_config(AutoencoderConfig, config, overrides or []), dry_run)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def train(config: AutoencoderConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    if config.precision == "fp16" and config.loss.adversarial > 0.0:  # one scale for two losses
        raise UserError("loss.adversarial does not go with precision fp16: set precision: bf16")
    with Run(config, dry) as run:
        fit(config, run)


def fit(config: AutoencoderConfig, run: Run) -> None:
    """Build -> prepare -> loop -> save."""
    optim = config.optim
    examples, held_out = split_examples(config.data)
    run.say(f"{len(examples)} pictures for training, {len(held_out)} held out")
    if run.dry:
        check_all(examples, config.data.size, run)

    torch.manual_seed(config.seed)  # the initial weights
    vae = build_vae(
        config.model.kind,
        config.model.channels,
        config.model.layers,
        config.model.latent_channels,
        config.model.norm_groups,
        config.data.size,
        config.model.codes,
    )
    critic = PatchDiscriminator()
    losses = Losses(config, run.device)

    module = Autoencoding(vae)
    start = 0
    optimizer = adamw(vae.parameters(), optim)
    critic_optimizer = adamw(critic.parameters(), optim)
    if found := run.resume():
        tensors, state = found
        vae.load_state_dict(tensors["vae"])
        critic.load_state_dict(tensors["critic"])
        unpack_optimizer(optimizer, tensors["optimizer"])
        unpack_optimizer(critic_optimizer, tensors["critic_optimizer"])
        start = int(str(state["step"]))
    module, critic, optimizer, critic_optimizer = run.accelerator.prepare(
        module, critic, optimizer, critic_optimizer
    )
    ema = EMA(vae, optim.ema_decay)
    if found:
        tensors, state = found
        ema.load_state_dict(tensors["ema"], int(str(state["ema_updates"])))
        del found, tensors  # of the size of all that is trained, thrice
    parameters = list(module.parameters())
    critic_parameters = list(critic.parameters())

    def save(step: int) -> None:
        run.save(
            step,
            {
                "vae": vae.state_dict(),
                "ema": ema.state_dict(),
                "critic": run.accelerator.unwrap_model(critic).state_dict(),
                "optimizer": pack_optimizer(optimizer),
                "critic_optimizer": pack_optimizer(critic_optimizer),
            },
            {"ema_updates": ema.updates},
        )

    stop = min(start + 1, optim.steps) if run.dry else optim.steps
    shares = Shares(
        sample_order(examples, config.data, config.seed),
        range(start, stop),
        optim.batch_size,
        run.accelerator.process_index,
        run.accelerator.num_processes,
    )
    latent_size = config.data.size // 2 ** (len(config.model.channels) - 1)
    shape = (config.model.latent_channels, latent_size, latent_size)
    last_layer = vae.decoder.conv_out.weight

    def terms(items: Sequence[tuple[Tensor, Key]]) -> dict[str, Tensor]:
        """The loss of both networks on a micro-batch; the adaptive weight is that micro-batch's."""
        step = items[0][1][0]
        real = to_range(torch.stack([picture for picture, _ in items])).to(run.device)
        noise = sample_noise(config.seed, step, [place for _, (_, place, _) in items], shape)[0]
        fake, regulariser = module(real, noise.to(run.device))
        fake = fake.float()
        values = losses(real, fake, regulariser)
        if losses.adversarial_on(step):
            critic.requires_grad_(False)
            adversarial = -critic(fake).mean()
            critic.requires_grad_(True)
            weight = adaptive_weight(values["loss"], adversarial, last_layer)
            critic_loss = discriminator_hinge(critic(real), critic(fake.detach()))
            values["loss"] = values["loss"] + config.loss.adversarial * weight * adversarial
            # no parameter is in both sums, so each network gets its own gradient of the total
            values["loss"] = values["loss"] + critic_loss
            values |= {"adversarial": adversarial, "weight": weight, "critic": critic_loss}
        return values

    pictures = PictureSet(examples, config.data.size)
    with run.signals(), run.bar(start, stop) as bar:
        for items in shares_of_pictures(pictures, shares, config.data.workers):
            step = items[0][1][0]
            rate = learning_rate(optim, step)
            both = [*parameters, *critic_parameters]
            values = run.gradients([module, critic], both, items, terms)
            parts = [(optimizer, parameters), (critic_optimizer, critic_parameters)]
            if run.optimize(rate, *parts[: 1 + losses.adversarial_on(step)]):
                ema.update()

            bar.update()
            done = step + 1
            if done % config.log_every == 0 or done == stop:
                means = {name: value.item() for name, value in values.items()}
                run.record(done, {**means, "lr": rate})
                bar.set_postfix({"l1": f"{means['l1']:.4f}", "bad": run.bad_steps})
            if done % config.evaluate_every == 0 or done == stop:
                with ema.applied():
                    evaluate(run, vae, held_out, config.data.size, done)
            stopping = run.stopping
            if done % config.checkpoint_every == 0 or done == stop or stopping:
                save(done)
            if stopping:
                raise SystemExit(128 + stopping)

    if run.dry:
        run.say("dry run: data, one step and one save are fine")
        return
    with ema.applied():
        finish(run, vae, examples, config.data.size)


def check_all(examples: list[Example], size: int, run: Run) -> None:
    """Decode every picture once, so that a broken one is named before the run starts."""
    pictures = PictureSet(examples, size)
    for number in range(len(examples)):
        pictures.load(number)
    run.say(f"all {len(examples)} pictures can be read")


@torch.no_grad()
def evaluate(run: Run, vae: VAE, held_out: list[Example], size: int, step: int) -> None:
    """PSNR over the held-out pictures and a grid of the first eight with their reconstructions."""
    if not run.main or not held_out:
        return
    pictures = PictureSet(held_out, size)
    scores: list[float] = []
    shown: list[Tensor] = []
    for first in range(0, len(held_out), 32):
        numbers = range(first, min(first + 32, len(held_out)))
        real = to_range(torch.stack([pictures.load(n) for n in numbers])).to(run.device)
        mean = encode_moments(vae, real).chunk(2, 1)[0]
        fake = vae.decode(mean).sample.float().clamp(-1, 1)  # pyright: ignore
        scores += psnr(real, fake).tolist()
        if first == 0:
            shown = [*real[:8], *fake[:8]]
    mean_psnr = sum(scores) / len(scores)
    run.record(step, {"psnr": mean_psnr})
    run.say(f"step {step}: PSNR {mean_psnr:.2f} dB on {len(scores)} held-out pictures")
    run.picture(step, "reconstructions", grid([to_pil(picture) for picture in shown], 8))


@torch.no_grad()
def finish(run: Run, vae: VAE, examples: list[Example], size: int) -> None:
    """Measure the latents of the training pictures, write their scale and shift, save the VAE.

    A KL model has them folded into its weights, channel by channel; a VQ model, whose codes are
    what they are, gets one scaling factor.
    """
    if not run.main:
        return
    mean, std = latent_statistics(run, vae, examples, size)
    if isinstance(vae, AutoencoderKL):
        standardise_latents(vae, mean, std)
    else:
        scale = float((std.square() + mean.square()).mean().rsqrt())
        vae.register_to_config(scaling_factor=scale)
    save_network(vae, run.out / "vae")
    run.say(f"latents had mean {mean.mean():.3f} and std {std.mean():.3f}; wrote {run.out / 'vae'}")


def latent_statistics(
    run: Run, vae: VAE, examples: list[Example], size: int, most: int = 2048
) -> tuple[Tensor, Tensor]:
    """Mean and std [C] of the latent channels over pictures and places, spread included.

    Of more than `most` pictures every n-th is measured.
    """
    chosen = examples[:: -(-len(examples) // most)]
    pictures = PictureSet(chosen, size)
    parts: list[Tensor] = []
    for start in tqdm(range(0, len(chosen), 64), desc="latents", disable=not run.main):
        numbers = range(start, min(start + 64, len(chosen)))
        real = to_range(torch.stack([pictures.load(n) for n in numbers])).to(run.device)
        with run.accelerator.autocast():
            parts.append(encode_moments(vae, real))
    mean, std = torch.cat(parts).double().chunk(2, 1)
    centre = mean.mean((0, 2, 3))
    spread = ((mean - centre[:, None, None]).square() + std.square()).mean((0, 2, 3)).sqrt()
    return centre.float(), spread.float()


if __name__ == "__main__":
    typer.run(main)
