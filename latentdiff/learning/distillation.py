"""Targets of a distilled network: the steps of its teacher, as those of one call.

An estimate here is a function of x_t [B, C, h, w] and a level for each picture; it gives x_0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.errors import UserError
from latentdiff.learning.order import Stream, generator
from latentdiff.models.cross_attention_unet import CrossAttentionUNet, GeneratorUNet

LCM_SCALING = 10.0
"""Factor of the times in c_skip and c_out, as the solver "lcm" has it."""

GUIDANCE_WIDTH = 256
"""Width of the embedding of the guidance scale, as in the networks of Luo et al. 2023."""

TeacherSolver = Literal["ddim", "heun"]


@dataclass(frozen=True)
class Levels:
    """A noise level for each picture of a batch, in float64.

    Attributes:
        t: times [B].
        alpha: scale of the data in x_t [B, 1, 1, 1].
        sigma: standard deviation of the noise in x_t [B, 1, 1, 1].
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, levels: Sequence[NoiseLevel], device: torch.device | str = "cpu") -> Self:
        """These levels, one for each picture."""
        rows = [(level.t, level.alpha, level.sigma) for level in levels]
        t, alpha, sigma = torch.tensor(rows, dtype=torch.float64, device=device).unbind(1)
        return cls(t, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1))

    @property
    def snr(self) -> Tensor:
        """alpha^2 / sigma^2 [B]; infinite for clean data."""
        return (self.alpha / self.sigma).square().flatten()


Estimate = Callable[[Tensor, Levels], Tensor]


def noised(latents: Tensor, noise: Tensor, level: Levels) -> Tensor:
    """x_t = alpha x_0 + sigma noise: Ho et al. 2020, eq. 4."""
    return level.alpha.to(latents) * latents + level.sigma.to(latents) * noise


def ddim_step(x: Tensor, x0: Tensor, here: Levels, there: Levels) -> Tensor:
    """Keep the estimated x_0 and the noise: Song et al. 2021 (DDIM), eq. 12 without fresh noise."""
    keep = there.sigma / here.sigma
    return keep.to(x) * x + (there.alpha - keep * here.alpha).to(x) * x0


def teacher_step(
    estimate: Estimate, x: Tensor, here: Levels, there: Levels, solver: TeacherSolver
) -> Tensor:
    """One step of the teacher's ODE, of first order (DDIM) or second.

    "heun" is algorithm 1 of Karras et al. 2022 in y = x / alpha, without fresh noise; a step to
    clean data is DDIM's, as theirs is Euler's.
    """
    x0 = estimate(x, here)
    first = ddim_step(x, x0, here, there)
    if solver == "ddim":
        return first
    clean = there.sigma == 0
    then = Levels(there.t, there.alpha, torch.where(clean, 1.0, there.sigma))
    begin, end = here.sigma / here.alpha, then.sigma / then.alpha
    slope = (x / here.alpha.to(x) - x0) / begin.to(x)
    slope_there = (first / then.alpha.to(x) - estimate(first, then)) / end.to(x)
    y = x / here.alpha.to(x) + (end - begin).to(x) * (slope + slope_there) / 2
    return torch.where(clean, first, then.alpha.to(x) * y)


def progressive_target(
    estimate: Estimate, x: Tensor, here: Levels, middle: Levels, there: Levels
) -> Tensor:
    """The x_0 with which one DDIM step from `here` ends where two of the teacher's end.

    Salimans & Ho 2022 (Progressive Distillation), algorithm 2:
    (x'' - (sigma'' / sigma) x) / (alpha'' - (sigma'' / sigma) alpha).
    """
    half = ddim_step(x, estimate(x, here), here, middle)
    end = ddim_step(half, estimate(half, middle), middle, there)
    keep = there.sigma / here.sigma
    return (end - keep.to(x) * x) / (there.alpha - keep * here.alpha).to(x)


def consistency(x: Tensor, x0: Tensor, level: Levels) -> Tensor:
    """The consistency function c_skip x + c_out x_0, which is x itself at t = 0.

    Luo et al. 2023 (LCM), eq. 9, with the c_skip and c_out that the solver "lcm" draws with.
    """
    time = (level.t * LCM_SCALING).view(-1, 1, 1, 1)
    power = time.square() + 0.25
    return (0.25 / power).to(x) * x + (time / power.sqrt()).to(x) * x0


def guided(positive: Tensor, negative: Tensor, scales: Tensor) -> Tensor:
    """negative + scale (positive - negative), a scale for each picture [B]; 1 is off.

    The target of Meng et al. 2023 (On Distillation of Guided Diffusion Models), stage one, whose w
    is scale - 1.
    """
    return negative + scales.to(positive).view(-1, 1, 1, 1) * (positive - negative)


def pseudo_huber(output: Tensor, target: Tensor) -> Tensor:
    """sqrt(|output - target|^2 + c^2) - c of each picture, their mean; c = 0.00054 sqrt(D).

    Song & Dhariwal 2023 (Improved Techniques for Training Consistency Models), section 3.3.
    """
    c = 0.00054 * output[0].numel() ** 0.5
    squared = (output - target).square().flatten(1).sum(1)
    return ((squared + c**2).sqrt() - c).mean()


def consistency_loss(output: Tensor, target: Tensor, here: Levels) -> Tensor:
    """`pseudo_huber` of two estimates of x_0 at a level, in errors of v.

    An error of v is one of sigma in x_0 (Salimans & Ho 2022: x_0 = alpha x - sigma v), so that
    losses of x_0 would let go of what the network knows of little noise.
    """
    sigma = here.sigma.to(output)
    return pseudo_huber(output / sigma, target / sigma)


def draw_scales(
    seed: int, step: int, places: Sequence[int], between: tuple[float, float]
) -> list[float]:
    """A guidance scale for each picture, uniform between two: f(seed, step, place)."""
    low, high = between
    draws = [generator(seed, Stream.GUIDANCE, step, place) for place in places]
    return [low + (high - low) * float(draw.random()) for draw in draws]


def consistency_levels(process: Process, count: int) -> list[NoiseLevel]:
    """The levels between which a consistency function is learned: count + 1, from noise to t = 0.

    The times of the solver "lcm" for a teacher of so many steps: Luo et al. 2023, section 4.3.
    """
    apart = int(process.t_max + 1) // count
    return [process.level(float(apart * n - 1)) for n in range(count, 0, -1)] + [process.level(0.0)]


def with_guidance_input(bundle: Bundle) -> Bundle:
    """The model with a U-Net that is told its guidance scale; at first it draws as if it were not.

    As Meng et al. 2023 tell their w, in stage one; the layout is that of latent consistency models,
    `time_cond_proj_dim`.

    Raises:
        UserError: it has a transformer.
    """
    if bundle.network.guidance_width is not None:
        return bundle
    if bundle.network.part != "unet":
        raise UserError(f"{bundle.name} has a transformer, which is not told its guidance scale")
    plain: Any = bundle.network.module
    config = {**plain.config, "time_cond_proj_dim": GUIDANCE_WIDTH}
    ours = isinstance(plain, CrossAttentionUNet)
    made: Any = CrossAttentionUNet if ours else type(plain).from_config
    return _begun_as(bundle, made(config))


def with_noise_input(bundle: Bundle, width: int) -> Bundle:
    """The model with a generator as its U-Net, told noise [B, width]; at first it does not hear it.

    Raises:
        UserError: its U-Net is not one of our own.
    """
    plain = bundle.network.module
    if type(plain) is not CrossAttentionUNet or bundle.network.guidance_width is not None:
        raise UserError(
            f"{bundle.name}: a generator begins as a plain U-Net of our own class alone"
        )
    return _begun_as(bundle, GeneratorUNet({**plain.config, "time_cond_proj_dim": width}))


def _begun_as(bundle: Bundle, unet: Any) -> Bundle:
    """The model with this U-Net of one more input, which begins as its own."""
    unet.load_state_dict(bundle.network.module.state_dict(), strict=False)
    nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    nn.Module.to(unet, bundle.device, bundle.network.dtype)
    return replace(bundle, network=bundle.network.with_module(unet.eval()))
