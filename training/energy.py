"""Train an energy-based model of a model's latents by recovery likelihood.

    python training/energy.py --config training/configs/emoji128-energy.yaml

After Gao et al. 2021: at each of a few levels an energy learns from data and from draws of Langevin
dynamics, both given the same noisier picture. The autoencoder and the text encoder are those of
`model`; the energy is a small U-Net with a scalar head, trained from nothing. Ends by writing
`OUT/model`, whose U-Net gives the score: it is drawn with as it learned, by "recovery-langevin", or
by any other solver. Run the same command again to resume.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
import typer
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion import timetable
from latentdiff.diffusion.process import DiscreteVP
from latentdiff.errors import UserError
from latentdiff.learning.captioned_latents import CaptionedLatents
from latentdiff.learning.command import ConfigFile, DryRun, Overrides, told_in_one_line
from latentdiff.learning.config import ModelRunConfig, Strict, load_config
from latentdiff.learning.denoising_gan import forward_pair
from latentdiff.learning.distillation import Levels
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.order import Key, columns, spread_uniform
from latentdiff.learning.recovery import ConditionedEnergy, recovery_langevin, recovery_loss
from latentdiff.learning.results import save_model
from latentdiff.learning.run import Run
from latentdiff.learning.sample_grid import record_samples
from latentdiff.learning.trained import Trained
from latentdiff.models.cross_attention_unet import EnergyUNet
from latentdiff.models.network import DiffusersUNet
from latentdiff.models.unet import build_unet


class EnergyShape(Strict):
    """The U-Net in an energy: its norms have 32 groups, and a group of one channel would erase the
    time."""

    channels: tuple[Annotated[int, Field(ge=64, multiple_of=32)], ...] = (64, 128)
    layers: PositiveInt = 1
    attention: tuple[bool, ...] = (False, True)
    head_dim: PositiveInt = 64

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if len(self.channels) != len(self.attention):
            raise ValueError(
                f"channels has {len(self.channels)} levels and attention {len(self.attention)}"
            )
        return self


class EnergyConfig(ModelRunConfig):
    """Settings of an energy.

    Attributes:
        model: whose autoencoder, text encoder and process are used; null: the bundled model's.
        levels: noise levels, along the timetable "trailing".
        langevin: K, the steps by which a draw is made.
        size: of these steps, as a share of the variance of what is drawn.
    """

    unet: EnergyShape = EnergyShape()
    levels: int = Field(default=8, ge=2)
    langevin: PositiveInt = 30
    size: PositiveFloat = 0.2
    save_dtype: Literal["float32", "float16"] = "float32"


def main(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train an energy-based model by recovery likelihood; re-run the same command to resume."""
    with told_in_one_line():
        train(load_config(EnergyConfig, config, overrides or []), dry_run)


def train(config: EnergyConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    with Run(config, dry) as run:
        fit(run, Recovery(config, run))


class Recovery(Objective[Key]):
    """An energy that learns from pictures and from its own draws, given the same noisier ones."""

    def __init__(self, config: EnergyConfig, run: Run) -> None:
        self.config, self.run = config, run
        base = Bundle.load(config.model, dtype="float32", device=run.device)
        if not isinstance(base.process, DiscreteVP):
            raise UserError(
                f"{base.name}: an energy is learned along a variance-preserving process"
            )
        for network in base.modules.values():
            network.requires_grad_(False)
        self.pictures = CaptionedLatents(base, config.data, run)
        self.examples, self.order = self.pictures.examples, self.pictures.order
        *self.levels, _ = timetable.create("trailing", base.process, config.levels)
        torch.manual_seed(config.seed)  # the initial weights
        bundle = fresh_energy(base, config, self.pictures.shape)
        module = ConditionedEnergy(bundle)
        self.shown = run.shown(bundle, module)
        self.model = Trained("model", module, config.optim)
        self.trained = [self.model]

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        config, network = self.config, self.model.network
        step, places, samples = columns(items)
        draws = config.langevin + 2
        latents, noise, words = self.pictures.draw(step, places, samples, draws)
        uniform = spread_uniform(config.seed, step, places, config.optim.batch_size)
        numbers = (uniform * (len(self.levels) - 1)).int().tolist()
        here, there = (
            Levels.of([self.levels[number + later] for number in numbers], self.run.device)
            for later in (0, 1)
        )
        real, x = forward_pair(latents, noise[0], noise[1], here, there)
        t = there.t.float()

        def log_density(cleaner: Tensor) -> Tensor:
            return network(cleaner, t, words)

        made = recovery_langevin(log_density, x, here, there, noise[2:], config.size)
        loss = recovery_loss(log_density(real), log_density(made))
        apart = (made - real).square().mean().sqrt()
        return {"loss": loss, "apart": apart, "spread": made.square().mean().sqrt()}

    def evaluate(self, step: int) -> None:
        """A grid of pictures, for the configured prompts or the first captions."""
        run, config = self.run, self.config
        record_samples(run, step, self.shown, config, self.examples, steps=config.levels, scale=1.0)

    def finish(self) -> None:
        """Write the model's folder, with its card."""
        with self.shown.whole() as bundle:
            if self.run.main:
                options = f"--steps {self.config.levels} --guidance-scale 1"
                save_model(self.run, bundle, self.config, self.examples, options)


def fresh_energy(base: Bundle, config: EnergyConfig, shape: tuple[int, ...]) -> Bundle:
    """The model with a fresh energy as its U-Net, to be drawn with by Langevin dynamics.

    Raises:
        UserError: the sizes do not fit the data.
    """
    settings, (channels, side, _) = config.unet, shape
    unit = base.factor * 2 ** (len(settings.channels) - 1)
    if config.data.size % unit:
        raise UserError(
            f"data.size={config.data.size} is no multiple of {unit}, as the U-Net needs"
        )
    plain = build_unet(
        channels,
        side,
        settings.channels,
        settings.layers,
        settings.attention,
        settings.head_dim,
        base.conditioner.width,
    )
    energy = EnergyUNet(plain.config)
    energy.load_state_dict(plain.state_dict())
    network = DiffusersUNet(energy.to(base.device), channels)
    steps = Steps("trailing")
    return replace(
        base, network=network, prediction="score", solver="recovery-langevin", steps=steps
    )


if __name__ == "__main__":
    typer.run(main)
