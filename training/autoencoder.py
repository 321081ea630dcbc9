"""Stage 1: train the autoencoder.

    accelerate launch training/autoencoder.py --config training/configs/emoji64-autoencoder.yaml

L1 + perceptual + KL or VQ, and from `loss.adversarial_start` on a hinge patch-adversarial term with
adaptive weight (Esser et al. 2021, eq. 6-7; Rombach et al. 2022, appendix G). Ends by measuring the
latents and writing `OUT/vae` in the diffusers layout. Run the same command again to resume.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
import typer
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import UserError
from latentdiff.formats.diffusers_save import save_network
from latentdiff.learning.batches import (
    PictureSet,
    sample_order,
    shares_of_pictures,
    split_examples,
    to_range,
)
from latentdiff.learning.command import ConfigFile, DryRun, Overrides, told_in_one_line
from latentdiff.learning.config import DataConfig, RunConfig, Strict, load_config
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.losses import adaptive_weight, discriminator_hinge
from latentdiff.learning.order import Key, Shares, columns, sample_noise
from latentdiff.learning.run import Run
from latentdiff.learning.trained import Trained
from latentdiff.metrics.perceptual import create as perceptual_distance
from latentdiff.metrics.psnr import psnr
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.models.vae import (
    AutoencoderKL,
    Autoencoding,
    build_vae,
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
        if self.data.latents is not None:
            raise ValueError("data.latents are of an autoencoder that is trained: for stage 2")
        return self


def main(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train an autoencoder on a folder of pictures; re-run the same command to resume."""
    with told_in_one_line():
        train(load_config(AutoencoderConfig, config, overrides or []), dry_run)


def train(config: AutoencoderConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    if config.precision == "fp16" and config.loss.adversarial > 0.0:  # one scale for two losses
        raise UserError("loss.adversarial does not go with precision fp16: set precision: bf16")
    with Run(config, dry) as run:
        fit(run, Reconstruction(config, run))


class Reconstruction(Objective[tuple[Tensor, Key]]):
    """An autoencoder that reconstructs pictures, and a critic that tells which are real."""

    told = "l1"

    def __init__(self, config: AutoencoderConfig, run: Run) -> None:
        data, model, optim = config.data, config.model, config.optim
        self.config, self.run = config, run
        self.examples, self.held_out = split_examples(data)
        run.say(f"{len(self.examples)} pictures for training, {len(self.held_out)} held out")
        self.pictures = PictureSet(self.examples, data.size)
        if run.dry:
            for _ in self.pictures.parts(64):  # a broken one is named before the run starts
                pass
            run.say(f"all {len(self.examples)} pictures can be read")
        self.order = sample_order(self.examples, data, config.seed)
        side = data.size // 2 ** (len(model.channels) - 1)
        self.latent_shape = (model.latent_channels, side, side)

        torch.manual_seed(config.seed)  # the initial weights
        self.vae = build_vae(
            model.kind,
            model.channels,
            model.layers,
            model.latent_channels,
            model.norm_groups,
            data.size,
            model.codes,
        )
        self.model = Trained("vae", self.vae, optim, called=Autoencoding(self.vae))
        self.critic = Trained("critic", PatchDiscriminator(), optim, averaged=False)
        self.trained = [self.model, self.critic]
        self.distance = perceptual_distance(config.loss.perceptual_features).to(run.device)

    def adversarial(self, step: int) -> bool:
        """Tell whether the adversarial loss is on at this step."""
        start = int(self.config.loss.adversarial_start * self.config.optim.steps)
        return self.config.loss.adversarial > 0.0 and step >= start

    def stepping(self, step: int) -> Sequence[Trained]:
        return self.trained if self.adversarial(step) else [self.model]

    def batches(self, shares: Shares) -> Iterator[list[tuple[Tensor, Key]]]:
        return shares_of_pictures(self.pictures, shares, self.config.data.workers)

    def terms(self, items: Sequence[tuple[Tensor, Key]]) -> dict[str, Tensor]:
        """The loss of both networks on a micro-batch; the adaptive weight is that micro-batch's."""
        weights, critic = self.config.loss, self.critic.network
        step, places, _ = columns([key for _, key in items])
        real = to_range(torch.stack([picture for picture, _ in items])).to(self.run.device)
        noise = sample_noise(self.config.seed, step, places, self.latent_shape)[0]
        fake, regulariser = self.model.network(real, noise.to(self.run.device))
        fake = fake.float()
        l1, perceptual = F.l1_loss(fake, real), self.distance(fake, real).mean()
        loss = weights.l1 * l1 + weights.perceptual * perceptual + weights.regulariser * regulariser
        values = {"loss": loss, "l1": l1, "perceptual": perceptual, "regulariser": regulariser}
        if not self.adversarial(step):
            return values
        critic.requires_grad_(False)
        adversarial = -critic(fake).mean()
        critic.requires_grad_(True)
        weight = adaptive_weight(loss, adversarial, self.vae.decoder.conv_out.weight)
        critic_loss = discriminator_hinge(critic(real), critic(fake.detach()))
        # no parameter is in both sums, so each network gets its own gradient of the total
        values["loss"] = loss + weights.adversarial * weight * adversarial + critic_loss
        return values | {"adversarial": adversarial, "weight": weight, "critic": critic_loss}

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float] | None:
        """PSNR over the held-out pictures; a grid of the first eight, above what they become."""
        if not self.run.main or not self.held_out:
            return None
        scores: list[float] = []
        shown: list[Tensor] = []
        autoencoder = DiffusersAutoencoder(self.vae)
        for part in PictureSet(self.held_out, self.config.data.size).parts(32):
            real = part.to(self.run.device)
            fake = autoencoder.decode(autoencoder.encode(real)).clamp(-1, 1)
            scores += psnr(real, fake).tolist()
            shown = shown or [*real[:8], *fake[:8]]
        self.run.picture(step, "reconstructions", grid([to_pil(picture) for picture in shown], 8))
        return {"psnr": sum(scores) / len(scores)}

    @torch.no_grad()
    def finish(self) -> None:
        """Measure the latents of the training pictures, write their scale and shift, save the VAE.

        A KL model has them folded into its weights, channel by channel; a VQ model, whose codes are
        what they are, gets one scaling factor.
        """
        if not self.run.main:
            return
        mean, std = self.latent_statistics()
        if isinstance(self.vae, AutoencoderKL):
            standardise_latents(self.vae, mean, std)
        else:
            scale = float((std.square() + mean.square()).mean().rsqrt())
            self.vae.register_to_config(scaling_factor=scale)
        save_network(self.vae, self.run.out / "vae")
        told = f"latents had mean {mean.mean():.3f} and std {std.mean():.3f}"
        self.run.say(f"{told}; wrote {self.run.out / 'vae'}")

    def latent_statistics(self, most: int = 2048) -> tuple[Tensor, Tensor]:
        """Mean and std [C] of the latent channels over pictures and places, spread included.

        Of more than `most` pictures every n-th is measured.
        """
        chosen = self.examples[:: -(-len(self.examples) // most)]
        parts: list[Tensor] = []
        autoencoder = DiffusersAutoencoder(self.vae)
        with self.run.accelerator.autocast(), tqdm(total=len(chosen), desc="latents") as bar:
            for real in PictureSet(chosen, self.config.data.size).parts(64):
                parts.append(autoencoder.moments(real))
                bar.update(len(real))
        mean, std = torch.cat(parts).double().chunk(2, 1)
        centre = mean.mean((0, 2, 3))
        spread = ((mean - centre[:, None, None]).square() + std.square()).mean((0, 2, 3)).sqrt()
        return centre.float(), spread.float()


if __name__ == "__main__":
    typer.run(main)
