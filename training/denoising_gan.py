"""Train a denoising diffusion GAN: a model becomes a generator that draws in a few steps.

    python training/denoising_gan.py --config training/configs/emoji128-gan.yaml

After Xiao et al. 2022: each of a few long steps draws from a distribution of many shapes, which a
Gaussian would blur. The generator begins as the U-Net of `model`, with an input for noise, and
learns against a discriminator of pairs of neighbouring levels. Ends by writing `OUT/model`, which
the pipeline draws with. Run the same command again to resume.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import typer
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion import timetable
from latentdiff.diffusion.prediction import to_x0
from latentdiff.errors import UserError
from latentdiff.learning.captioned_latents import CaptionedLatents, check_size
from latentdiff.learning.command import ConfigFile, DryRun, Overrides, told_in_one_line
from latentdiff.learning.config import ModelRunConfig, load_config
from latentdiff.learning.denoising import Conditioned
from latentdiff.learning.denoising_gan import (
    discriminator_loss,
    draw_codes,
    forward_pair,
    generator_loss,
    gradient_penalty,
    posterior_draw,
)
from latentdiff.learning.distillation import Levels, with_noise_input
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.order import Key, columns, spread_uniform
from latentdiff.learning.results import save_model
from latentdiff.learning.run import Run
from latentdiff.learning.sample_grid import record_samples
from latentdiff.learning.trained import Trained
from latentdiff.models.discriminator import PairDiscriminator
from latentdiff.models.text_encoders import TextStates


class GanConfig(ModelRunConfig):
    """Settings of a denoising GAN.

    Attributes:
        model: what the generator begins as; null: the bundled model.
        steps: those that it learns, and is drawn with.
        noise: Z, the numbers that the generator is told.
        width: channels of the discriminator's first level.
        discriminator_lr: its learning rate; all else of its optimizer is as `optim` says.
        caption_dropout: share of the pictures without their caption, for classifier-free guidance.
        penalty: weight of R1.
        penalty_every: R1 is in the loss of every so many steps, so many times as heavy.
    """

    steps: PositiveInt = 4
    noise: PositiveInt = 64
    width: PositiveInt = 64
    discriminator_lr: PositiveFloat = 2e-4
    penalty: PositiveFloat = 0.05
    penalty_every: PositiveInt = 15
    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0)


def main(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a denoising diffusion GAN out of a model; re-run the same command to resume."""
    with told_in_one_line():
        train(load_config(GanConfig, config, overrides or []), dry_run)


def train(config: GanConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    if config.precision == "fp16":  # one scale for two losses
        raise UserError("a denoising GAN does not go with precision fp16: set precision: bf16")
    with Run(config, dry) as run:
        fit(run, Adversarial(config, run))


class Adversarial(Objective[Key]):
    """A generator that makes x_0, and a discriminator of what becomes of it."""

    told = "generator"

    def __init__(self, config: GanConfig, run: Run) -> None:
        self.config, self.run = config, run
        bundle = Bundle.load(config.model, dtype="float32", device=run.device)
        check_model(bundle, config)
        for network in bundle.modules.values():
            network.requires_grad_(False)
        self.pictures = CaptionedLatents(bundle, config.data, run, config.caption_dropout)
        self.examples, self.order = self.pictures.examples, self.pictures.order
        self.levels = timetable.create("trailing", bundle.process, config.steps)
        steps = Steps("trailing", trained_steps=config.steps)
        generator = replace(with_noise_input(bundle, config.noise), solver="ddpm", steps=steps)
        generator.network.module.requires_grad_(True)
        self.bundle = generator
        torch.manual_seed(config.seed)  # the initial weights
        critic = PairDiscriminator(bundle.latent_channels, bundle.conditioner.width, config.width)
        module = Conditioned(generator)
        self.shown = run.shown(generator, module)
        self.generator = Trained("generator", module, config.optim)
        optim = config.optim.model_copy(update={"lr": config.discriminator_lr})
        self.discriminator = Trained("discriminator", critic, optim, averaged=False)
        self.trained = [self.generator, self.discriminator]

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        """The losses of both networks; both step at once, from the same weights."""
        config, critic = self.config, self.discriminator.network
        step, places, samples = columns(items)
        at = config.seed, step, places
        latents, (first, second, third), words = self.pictures.draw(step, places, samples, 3)
        uniform = spread_uniform(*at, config.optim.batch_size)
        numbers = (uniform * config.steps).int().tolist()
        here, there = (
            Levels.of([self.levels[number + later] for number in numbers], self.run.device)
            for later in (0, 1)
        )
        real, x = forward_pair(latents, first, second, here, there)
        x0 = self.made(x, here, words, draw_codes(*at, config.noise).to(x))
        made = posterior_draw(x0, x, third, here, there)

        def told(pair: Tensor) -> Tensor:
            told_words = vectors(words).to(pair)
            return critic(unit(pair, there), unit(x, here), here.snr.log().float(), told_words)

        critic.requires_grad_(False)
        loss = generator_loss(told(made).float())
        critic.requires_grad_(True)
        penalised = step % config.penalty_every == 0
        real.requires_grad_(penalised)
        logits = told(real).float()
        of_critic = discriminator_loss(logits, told(made.detach()).float())
        values = {"generator": loss.detach(), "discriminator": of_critic.detach()}
        # no parameter is in both sums, so each network gets its own gradient of the total
        total = loss + of_critic
        if penalised:  # lazily, as Karras et al. 2020 (StyleGAN2)
            penalty = gradient_penalty(logits, real)
            total = total + config.penalty * config.penalty_every * penalty
            values["penalty"] = penalty.detach()
        return {"loss": total, **values}

    def made(self, x: Tensor, here: Levels, words: TextStates, codes: Tensor) -> Tensor:
        """x_0 [B, C, h, w] as the generator makes it of x_here and its noise [B, Z]."""
        scale = self.bundle.process.input_scale(here.alpha, here.sigma)
        output = self.generator.network((scale * x).to(x), here.t.float(), words, noise=codes)[
            :, : x.shape[1]
        ].float()
        return to_x0(self.bundle.prediction, output, x, here.alpha, here.sigma)

    def evaluate(self, step: int) -> None:
        """A grid of pictures, for the configured prompts or the first captions."""
        config = self.config
        record_samples(self.run, step, self.shown, config, self.examples, steps=config.steps)

    def finish(self) -> None:
        """Write the model's folder, with its card."""
        with self.shown.whole() as bundle:
            if self.run.main:
                options = f"--steps {self.config.steps}"
                save_model(self.run, bundle, self.config, self.examples, options)


def check_model(bundle: Bundle, config: GanConfig) -> None:
    """Pass if a generator can begin as this model.

    Raises:
        UserError: it sees more than x_t, tells a variance, or its sizes do not fit the data.
    """
    if bundle.kind != "text-to-image":
        raise UserError(
            f"{bundle.name} is an {bundle.kind} model, and no generator can begin as it"
        )
    if bundle.network.learns_variance:
        raise UserError(
            f"{bundle.name}: it tells a variance, and a generator's steps have one of their own"
        )
    check_size(config.data.size, bundle)


def unit(x: Tensor, level: Levels) -> Tensor:
    """x_t at about unit power, for data that is."""
    return x / (level.alpha.square() + level.sigma.square()).sqrt().to(x)


def vectors(words: TextStates) -> Tensor:
    """The mean of each caption's states [B, D]."""
    if words.mask is None:
        return words.states.mean(1)
    mask = words.mask[..., None].to(words.states)
    return (words.states * mask).sum(1) / mask.sum(1)


if __name__ == "__main__":
    typer.run(main)
