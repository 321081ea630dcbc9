"""Train both stages at once: autoencoder and prior, by the bound of both.

    python training/joint.py --config training/configs/emoji128-joint.yaml

After Vahdat et al. 2021 (LSGM): what the decoder says of a picture, less the entropy of its
latents, plus the cross-entropy of these to the prior, which is a diffusion model. Begins as
`model`, both stages of which go on learning. Ends by writing `OUT/model` in the diffusers layout.
Run the same command again to resume.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
import typer
from pydantic import Field, PositiveFloat
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.diffusion.process import DiscreteVP
from latentdiff.diffusion.variance import gaussian_surprise
from latentdiff.errors import UserError
from latentdiff.learning.batches import (
    PictureSet,
    sample_order,
    shares_of_pictures,
    split_examples,
    to_range,
)
from latentdiff.learning.captioned_latents import check_size
from latentdiff.learning.captions import Captions, CaptionStates
from latentdiff.learning.command import ConfigFile, DryRun, Overrides, told_in_one_line
from latentdiff.learning.config import ModelRunConfig, load_config
from latentdiff.learning.distillation import Levels, noised
from latentdiff.learning.joint import (
    JointAutoencoder,
    MixedPrior,
    cross_entropy,
    entropy,
    eps_of_v,
    even_in_log_snr,
    graded,
    unweighted,
)
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.order import Key, Shares, columns, sample_noise, spread_uniform
from latentdiff.learning.results import save_model
from latentdiff.learning.run import Run
from latentdiff.learning.sample_grid import sample_grid
from latentdiff.learning.trained import Trained
from latentdiff.metrics.psnr import psnr
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.text_encoders import TextStates

_MEASURED = 256  # held-out pictures at most
_GOLDEN = 0.6180339887498949  # whose multiples are spread evenly


class JointConfig(ModelRunConfig):
    """Settings of joint training.

    Attributes:
        model: what both stages begin as; null: the bundled model.
        decoder_std: of a pixel given its latents, in [-1, 1]; it weighs pictures against latents.
        prior: what the prior learns by, the likelihood or the plain error, even in time; the
            encoder learns by the likelihood.
        autoencoder_lr: the autoencoder's learning rate; all else is as `optim` says.
        caption_dropout: share of the pictures without their caption, for classifier-free guidance.
    """

    decoder_std: PositiveFloat = 0.1
    prior: Literal["likelihood", "unweighted"] = "unweighted"
    autoencoder_lr: PositiveFloat = 1e-4
    caption_dropout: float = Field(default=0.1, ge=0.0, le=1.0)


def main(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train autoencoder and prior by the bound of both; re-run the same command to resume."""
    with told_in_one_line():
        train(load_config(JointConfig, config, overrides or []), dry_run)


def train(config: JointConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    if config.data.latents is not None:
        raise UserError("data.latents are of an autoencoder that is trained: leave them out")
    with Run(config, dry) as run:
        fit(run, Joint(config, run))


class Joint(Objective[tuple[Tensor, Key]]):
    """An autoencoder and the prior of its latents, by the bound of both."""

    told = "bits"

    def __init__(self, config: JointConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.bundle = bundle = Bundle.load(config.model, dtype="float32", device=run.device)
        autoencoder = check_model(bundle, config)
        self.examples, self.held_out = split_examples(config.data)
        run.say(f"{len(self.examples)} pictures for training, {len(self.held_out)} held out")
        self.pictures = PictureSet(self.examples, config.data.size)
        self.order = sample_order(self.examples, config.data, config.seed)
        side = config.data.size // bundle.factor
        self.shape = bundle.latent_channels, side, side
        for network in bundle.conditioner.modules.values():
            network.requires_grad_(False)
        texts = [example.captions for example in self.examples]
        captions = Captions(bundle.conditioner, texts, config.caption_dropout, config.seed)
        run.say(*captions.warnings())
        self.states = CaptionStates(captions, bundle.conditioner, run.out / "cache")
        self.vae, self.mixed = JointAutoencoder(autoencoder), MixedPrior(bundle)
        for network in (self.vae.vae, self.mixed.unet):
            network.requires_grad_(True)
        self.shown = run.shown(bundle, self.mixed)
        self.prior = Trained("prior", self.mixed, config.optim)
        optim = config.optim.model_copy(update={"lr": config.autoencoder_lr})
        self.autoencoder = Trained("autoencoder", self.vae, optim)
        self.trained = [self.prior, self.autoencoder]

    def batches(self, shares: Shares) -> Iterator[list[tuple[Tensor, Key]]]:
        return shares_of_pictures(self.pictures, shares, self.config.data.workers)

    def terms(self, items: Sequence[tuple[Tensor, Key]]) -> dict[str, Tensor]:
        step, places, samples = columns([key for _, key in items])
        at = self.config.seed, step, places
        real = to_range(torch.stack([picture for picture, _ in items])).to(self.run.device)
        noise = sample_noise(*at, self.shape, 2).to(self.run.device)
        words = self.states.of(step, places, samples)
        uniform = spread_uniform(*at, self.config.optim.batch_size)
        return self.bound(real, noise, words, uniform.tolist())

    def bound(
        self, real: Tensor, noise: Tensor, words: TextStates, uniform: list[float]
    ) -> dict[str, Tensor]:
        """The bound of -log p(x) in bits a number, its parts, and the loss, nats a number.

        Args:
            real: pictures [B, 3, H, W] in [-1, 1].
            noise: of the latents and of the diffusion [2, B, C, h, w].
            words: a caption of each.
            uniform: shares of the way in log-SNR.
        """
        process, config = self.bundle.process, self.config
        latents, log_std, decoded = self.autoencoder.network(real, noise[0])
        rows = even_in_log_snr(process, uniform)
        level, weights = Levels.of(rows, self.run.device), 1.0
        if config.prior == "unweighted":
            weights = unweighted(process, rows).float().to(real.device)
        z = graded(noised(latents, noise[1], level), 1 / weights)
        v = self.prior.network(z, level.t.float(), words)
        errors = (noise[1] - eps_of_v(z, v, level)).square().flatten(1).sum(1)
        ends = process.level(process.t_max), process.level(process.t_min)
        surprise = gaussian_surprise(real - decoded.float(), math.log(config.decoder_std))
        surprise, held = surprise.flatten(1).sum(1), entropy(log_std)
        learned = surprise - held + cross_entropy(errors, latents, *ends, weights)
        plain = surprise - held + cross_entropy(errors, latents, *ends, 1.0)
        size = real[0].numel()
        found = {"bits": plain, "decoder": surprise, "divergence": plain - surprise}
        scale = 1 / (size * math.log(2))
        told = {name: (scale * value).mean().detach() for name, value in found.items()}
        return {"loss": learned.mean() / size, **told}

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float] | None:
        """The bound and the PSNR of held-out pictures, and a grid of samples."""
        if not self.run.main:
            return None
        with self.mixed.folded():
            self.draw(step)
        held = self.held_out[:_MEASURED]
        bits: list[float] = []
        scores: list[float] = []
        conditioner, first = self.bundle.conditioner, 0
        for part in PictureSet(held, self.config.data.size).parts(32):
            places = list(range(first, first + len(part)))
            first += len(part)
            noise = sample_noise(self.config.seed, 0, places, self.shape, 2).to(self.run.device)
            texts = [held[place].captions[0] for place in places]
            words = conditioner.states(conditioner.tokenize(texts))
            shares = [(place + 0.5) * _GOLDEN % 1 for place in places]
            real = part.to(self.run.device)
            found = self.bound(real, noise, words, shares)
            bits += [float(found["bits"])] * len(part)
            latents = self.bundle.autoencoder.encode(real)
            scores += psnr(real, self.bundle.autoencoder.decode(latents).clamp(-1, 1)).tolist()
        if not bits:
            return None
        return {"held out": sum(bits) / len(bits), "psnr": sum(scores) / len(scores)}

    def draw(self, step: int) -> None:
        """A grid of pictures, for the configured prompts or the first captions."""
        config = self.config
        drawn = sample_grid(self.bundle, config.sample_prompts, self.examples, config.seed)
        self.run.picture(step, "samples", drawn)

    def finish(self) -> None:
        """Write the model's folder, with its card."""
        if self.run.main:
            with self.mixed.folded():
                save_model(self.run, self.bundle, self.config, self.examples)


def check_model(bundle: Bundle, config: JointConfig) -> DiffusersAutoencoder:
    """The autoencoder of a model that can be trained jointly.

    Raises:
        UserError: its process, prediction, autoencoder or sizes are of another kind.
    """
    vae = bundle.autoencoder
    if not isinstance(vae, DiffusersAutoencoder) or not isinstance(vae.module, KLAutoencoder):
        raise UserError(f"{bundle.name}: joint training is for KL autoencoders of our own class")
    process = bundle.process
    ends = isinstance(process, DiscreteVP) and process.level(process.t_max).alpha > 0
    if not ends or bundle.prediction != "v" or bundle.network.learns_variance:
        raise UserError(
            f"{bundle.name}: joint training is for models that predict v along a "
            "variance-preserving process which keeps some signal, without a learned variance"
        )
    if bundle.kind != "text-to-image" or bundle.network.guidance_width is not None:
        raise UserError(f"{bundle.name}: joint training is for plain text-to-image models")
    check_size(config.data.size, bundle)
    return replace(vae, tiling="off")


if __name__ == "__main__":
    typer.run(main)
