"""The training loss of stage 2: times, noised latents, targets and their weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Hint
from latentdiff.diffusion.prediction import Prediction, target, to_x0
from latentdiff.diffusion.process import DiscreteVP, Process
from latentdiff.diffusion.variance import gaussian_kl, gaussian_surprise, learned_log_std
from latentdiff.errors import UserError
from latentdiff.learning.losses import min_snr_weight
from latentdiff.learning.order import Stream, generator
from latentdiff.models.control import ControlNetwork
from latentdiff.models.cross_attention_unet import EnergyUNet
from latentdiff.models.engines.compiling import training_code
from latentdiff.models.guidance_embedding import DISTILLED_SCALE, told_scale
from latentdiff.models.text_encoders import TextStates, Tokens

Times = Literal["uniform", "logit-normal"]


class Conditioned(nn.Module):
    """Network and conditioner as one module, so that Accelerate wraps, clips and averages both;
    and a ControlNet beside them, where one learns.

    Args:
        bundle: network and conditioner.
        control: the ControlNet.
        compiled: whether `torch.compile` makes the code of the network, for this module alone.

    Raises:
        UserError: there is no compiler for that, or the model is an energy.
    """

    def __init__(
        self, bundle: Bundle, control: ControlNetwork | None = None, *, compiled: bool = False
    ) -> None:
        super().__init__()
        if isinstance(bundle.network.module, EnergyUNet) and type(self) is Conditioned:
            raise UserError(f"{bundle.name} is an energy, which training/energy.py alone trains")
        if compiled:
            fast = training_code(bundle.network.module)
            bundle = replace(bundle, network=bundle.network.with_module(fast))
        self.control = None if control is None else control.module
        self._network = (control,)
        self.unet = bundle.network.module
        self.text = nn.ModuleDict(bundle.conditioner.modules)
        self._bundle = (bundle,)  # in a tuple, so that no module is registered twice

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        words: Tokens | TextStates,
        beside: Tensor | None = None,
        scales: float | Sequence[float] = DISTILLED_SCALE,
        pictures: Tensor | None = None,
        noise: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Predict [B, C or 2C, h, w] for scaled x_t [B, C, h, w] at times [B].

        Tokens go through the text encoders, for them to be trained; states, made before, do not. A
        network that is told its guidance scale is trained at `scales`, by default the one that it
        draws with by default. Control pictures [B, 3, H, W] in [0, 1] are for the ControlNet,
        noise [B, Z] for a generator, the levels [B] of the noise in what is shown beside x_t for a
        network that enlarges that.
        """
        (bundle,) = self._bundle
        text = bundle.conditioner.states(words) if isinstance(words, Tokens) else words
        size = x.shape[-2] * bundle.factor, x.shape[-1] * bundle.factor
        condition = bundle.conditioner.condition(text, size)
        condition = replace(condition, beside=beside, noise=noise, noise_level=noise_level)
        (network,) = self._network
        if network is not None and pictures is not None:
            hint = Hint(network, (network.module.embed(pictures),), torch.ones(len(x)))
            condition = replace(condition, control=(hint,))
        return bundle.network(x, t, told_scale(condition, bundle.network, scales))


def offset_noise(seed: int, step: int, places: list[int], channels: int) -> Tensor:
    """Standard normal [B, C, 1, 1], a constant over each picture's channel: f(seed, step, place).

    Some of it added to the noise lets a model learn to change the brightness of whole pictures
    (Guttenberg 2023, "Diffusion with offset noise").
    """
    draws = [generator(seed, Stream.OFFSET_NOISE, step, place) for place in places]
    rows = np.stack([draw.standard_normal(channels) for draw in draws])
    return torch.from_numpy(rows).float()[:, :, None, None]


def draw_times(
    process: Process, uniform: Tensor, kind: Times, within: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Training times [B], float64, from uniform numbers [B] in [0, 1).

    "uniform" over the process's times (whole ones if it is discrete); "logit-normal" is
    sigmoid(n), n standard normal (Esser et al. 2024, SD3, eq. 19).

    Args:
        within: the part of all times that is drawn from, of 0 (data) to 1 (noise).
    """
    if kind == "logit-normal":
        uniform = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)))
    uniform = within[0] + (within[1] - within[0]) * uniform
    if isinstance(process, DiscreteVP):
        return (uniform * process.num_train_timesteps).floor()
    return process.t_min + uniform * (process.t_max - process.t_min)


@dataclass(frozen=True)
class NoisedBatch:
    """Inputs and answers of one micro-batch.

    Attributes:
        x: x_t as the network sees it [B, C, h, w].
        t: times [B], float32.
        target: the target of its output [B, C, h, w].
        weights: per picture [B].
    """

    x: Tensor
    t: Tensor
    target: Tensor
    weights: Tensor


def noised_batch(
    process: Process,
    prediction: Prediction,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    min_snr_gamma: float | None,
) -> NoisedBatch:
    """x_t = alpha x_0 + sigma noise (Ho et al. 2020, eq. 4), its target and the loss weights.

    Args:
        latents: x_0, scaled [B, C, h, w].
        noise: standard normal [B, C, h, w].
        t: [B], float64, in the process's unit.
        min_snr_gamma: gamma of min-SNR weighting, or None for uniform weights.
    """
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in process.alpha_sigma(t))
    x_t = alpha.float() * latents + sigma.float() * noise
    scale = process.input_scale(alpha, sigma)
    scale = scale.float() if isinstance(scale, Tensor) else scale
    if min_snr_gamma is None:
        weights = torch.ones(len(t), device=t.device)
    else:
        log_snr = 2.0 * (alpha.log() - sigma.log()).flatten()
        weights = min_snr_weight(log_snr, prediction, min_snr_gamma)
    answer = target(prediction, latents, noise, alpha, sigma)
    return NoisedBatch(scale * x_t, t.float(), answer, weights)


def check_learned_variance(process: Process, times: Times) -> None:
    """Pass if the bound that a learned variance is trained with is defined.

    Raises:
        UserError: the process has no steps to bound, or not all of them are drawn alike.
    """
    if not isinstance(process, DiscreteVP) or times != "uniform":
        raise UserError(
            "objective.learned_variance needs a discrete process (one of vp-linear, "
            "vp-scaled-linear, vp-cosine, vp-sigmoid) and objective.times=uniform."
        )


def bound(
    process: Process,
    prediction: Prediction,
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """An estimate of the variational bound in bits per dimension, but for the prior's term: T times
    the mean of `bound_terms` over the batch, a scalar."""
    terms = bound_terms(process, prediction, output, latents, noise, t)
    return (process.t_max + 1) * terms.mean()


def bound_terms(
    process: Process,
    prediction: Prediction,
    output: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """L_t of the variational bound, to learn variances with: Nichol & Dhariwal 2021, eq. 4-6.

    The mean is detached (their section 3.1), so gradients reach v alone. L_0 is the density of
    continuous latents; the posterior's variance, which is 0 there, is that of t = 1, as in their
    code.

    Args:
        process: a discrete one.
        prediction: the prediction type of the first half of the output.
        output: output of the network, [B, 2C, h, w]; the second half is v.
        latents: x_0, [B, C, h, w].
        noise: the noise in x_t, [B, C, h, w].
        t: whole times [B], float64.

    Returns:
        [B] bits per dimension.
    """
    t = t.view(-1, 1, 1, 1)
    alpha, sigma = process.alpha_sigma(t)
    mean, v = output.float().chunk(2, dim=1)
    x_t = alpha.float() * latents + sigma.float() * noise
    error = latents - to_x0(prediction, mean.detach(), x_t, alpha, sigma)

    # q(x_(t-1) | x_t, x_0) in float64, at t >= 1; see `diffusion.solver.posterior_std`.
    here_alpha, here_sigma = process.alpha_sigma(t.clamp(min=1))
    there_alpha, there_sigma = process.alpha_sigma(t.clamp(min=1) - 1)
    kernel = (here_sigma**2 - (here_alpha / there_alpha * there_sigma) ** 2).sqrt()
    small = there_sigma / here_sigma * kernel
    keep = (there_sigma**2 - small**2).sqrt() / here_sigma
    distance = (there_alpha - keep * here_alpha).float() * error

    log_small = small.log().float()
    log_large = torch.where(t == 0, sigma, kernel).log().float()
    log_std = learned_log_std(v, log_small, log_large)
    step = gaussian_kl(log_small, log_std, distance)
    nats = torch.where(t == 0, gaussian_surprise(error, log_std), step)
    return nats.flatten(1).mean(1) / math.log(2)
