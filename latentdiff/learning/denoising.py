"""What one step of stage 2 is made of: times, noised latents, targets and their weights."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from latentdiff.learning.losses import min_snr_weight
from latentdiff.learning.order import generator
from latentdiff.prediction import Prediction, target
from latentdiff.process import DiscreteVP, Process
from latentdiff.text import TextStates, TextTower, Tokens


class Conditioned(nn.Module):
    """U-Net and text tower as one module, so that Accelerate wraps, clips and averages both."""

    def __init__(self, unet: UNet2DConditionModel, tower: TextTower) -> None:
        super().__init__()
        self.unet = unet
        self.text = tower.model
        self._tower = (tower,)  # in a tuple, so that its network is registered once

    def forward(self, x: Tensor, t: Tensor, words: Tokens | TextStates) -> Tensor:
        """The network's output [B, C, h, w] for scaled x_t [B, C, h, w] at times [B].

        Tokens go through the tower, for it to be trained; its states, made before, do not.
        """
        text = self._tower[0].states(words) if isinstance(words, Tokens) else words
        mask = None if text.mask is None else text.mask.to(x.device)
        return self.unet(x, t, text.states.to(x.device), encoder_attention_mask=mask).sample


def offset_noise(seed: int, step: int, places: list[int], channels: int) -> Tensor:
    """Standard normal [B, C, 1, 1], a constant over each picture's channel: f(seed, step, place).

    Some of it added to the noise lets a model learn to change the brightness of whole pictures
    (Guttenberg 2023, "Diffusion with offset noise").
    """
    rows = [generator(seed, 8, step, place).standard_normal(channels) for place in places]
    return torch.from_numpy(np.stack(rows)).float()[:, :, None, None]


def draw_times(
    process: Process, uniform: Tensor, kind: Literal["uniform", "logit-normal"]
) -> Tensor:
    """Training times [B], float64, from uniform numbers [B] in [0, 1).

    "uniform" over the process's times (whole ones if it is discrete); "logit-normal" is
    sigmoid(n), n standard normal (Esser et al. 2024, SD3, eq. 19).
    """
    if kind == "logit-normal":
        uniform = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)))
    if isinstance(process, DiscreteVP):
        return (uniform * process.num_train_timesteps).floor()
    return process.t_min + uniform * (process.t_max - process.t_min)


@dataclass(frozen=True)
class NoisedBatch:
    """Inputs and answers of one micro-batch.

    Attributes:
        x: x_t as the network sees it [B, C, h, w].
        t: times [B], float32.
        target: what it should say [B, C, h, w].
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
