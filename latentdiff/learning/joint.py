"""Both stages learned at once: the bound of a model whose prior is a diffusion of its latents.

Vahdat et al. 2021, "Score-based Generative Modeling in Latent Space" (LSGM). With an encoder q, a
decoder p and a prior that is drawn by diffusion, -log p(x) is at most

    E_q[-log p(x | z_0)] - H(q(z_0 | x)) + CE(q(z_0 | x), p(z_0)),

whose cross-entropy is an integral over the noise of the prior's errors. All of it is in nats.
Every level here is of a variance-preserving process.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.diffusion.process import NoiseLevel, Process
from latentdiff.learning.denoising import Conditioned
from latentdiff.learning.distillation import Levels
from latentdiff.models.autoencoder import DiffusersAutoencoder, latent_affine
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.text_encoders import TextStates

_START = 4.0  # logit of the mixing coefficients


def even_in_log_snr(process: Process, uniform: Sequence[float]) -> list[NoiseLevel]:
    """The levels at these shares (0..1) of the way in log-SNR from the noise end to the data end.

    Such times have the density g^2 / sigma^2, up to a factor: the importance sampling by which the
    likelihood's weight becomes a constant (Vahdat et al. 2021, on reducing the variance).
    """
    first, last = process.log_snr(process.t_max), process.log_snr(process.t_min)
    places = [first + (last - first) * share for share in uniform]
    return [process.level(process.t_of_log_snr(place)) for place in places]


def cross_entropy(
    errors: Tensor, latents: Tensor, first: NoiseLevel, last: NoiseLevel, weights: Tensor | float
) -> Tensor:
    """CE(q(z_0 | x), p(z_0)) of each picture, from one time each: Vahdat et al. 2021.

    In log-SNR l the integral of g^2 / 2 |grad log q(z_t | z_0) - grad log p(z_t)|^2 dt is half that
    of |eps - eps_theta|^2 dl (Kingma et al. 2021, Variational Diffusion Models). At the noise end,
    where theirs has the standard normal, stands what is left of z_0.

    Args:
        errors: |eps - eps_theta|^2 [B], sums over a picture, at times even in log-SNR.
        latents: z_0 [B, C, h, w].
        first, last: the levels between which the times are, noise and data.
        weights: of the errors [B], whose mean is 1; 1 is the likelihood's.
    """
    size = latents[0].numel()
    across = 0.5 * (last.log_snr - first.log_snr) * weights * errors
    left = (first.alpha * latents).square() + first.sigma**2 - 1 - 2 * math.log(first.sigma)
    at_data = 0.5 * size * math.log(2 * math.pi * math.e * last.sigma**2)
    return across + 0.5 * left.flatten(1).sum(1) + at_data


def entropy(log_std: Tensor) -> Tensor:
    """H of a Gaussian of independent numbers [B], from ln of its deviations [B, C, h, w]."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).flatten(1).sum(1)


def unweighted(process: Process, levels: Sequence[NoiseLevel]) -> Tensor:
    """Weights [B] that make a mean over times even in log-SNR one over even times, float64.

    So the prior may learn by the plain error, as Vahdat et al. 2021 have it for pictures' quality,
    at the times that are drawn for the likelihood.
    """
    whole = process.t_max - process.t_min
    near = 0.5 if whole > 10 else 1e-4 * whole  # between whole times log-SNR is linear
    total = process.log_snr(process.t_min) - process.log_snr(process.t_max)
    rows: list[float] = []
    for level in levels:
        ends = max(process.t_min, level.t - near), min(process.t_max, level.t + near)
        slope = (process.log_snr(ends[0]) - process.log_snr(ends[1])) / (ends[1] - ends[0])
        rows.append(total / whole / slope)
    return torch.tensor(rows, dtype=torch.float64)


def graded(x: Tensor, factor: Tensor | float) -> Tensor:
    """x [B, ...] itself, whose gradient arrives times a factor [B]: of a loss that is weighted for
    one network, another that x comes from learns as if it had been weighted otherwise."""
    if not isinstance(factor, Tensor):
        return x
    scale = factor.to(x).view(-1, *[1] * (x.ndim - 1))
    return x.detach() + scale * (x - x.detach())


def eps_of_v(z: Tensor, v: Tensor, level: Levels) -> Tensor:
    """sigma z_t + alpha v [B, C, h, w]: Salimans & Ho 2022, appendix D."""
    return level.sigma.to(z) * z + level.alpha.to(z) * v


class JointAutoencoder(nn.Module):
    """The autoencoder of a model as one pass, whose latents go to a prior too.

    Raises:
        ValueError: it is no KL autoencoder of ours.
    """

    def __init__(self, autoencoder: DiffusersAutoencoder) -> None:
        super().__init__()
        if not isinstance(autoencoder.module, KLAutoencoder):
            raise ValueError("a KL autoencoder of our own class is needed")
        self.vae = autoencoder.module
        self._autoencoder = (autoencoder,)

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, draw and decode.

        Args:
            pictures: [B, 3, H, W] in [-1, 1].
            noise: standard normal [B, C, h, w].

        Returns:
            Latents, standardised as everywhere, ln of their deviations [B, C, h, w] and pictures.
        """
        posterior = self.vae.encode(pictures)
        gain, offset = (part.to(pictures) for part in latent_affine(self.vae))
        log_std = 0.5 * posterior.logvar.float() - gain.abs().log()
        latents = (posterior.mean.float() - offset) / gain + log_std.exp() * noise
        return latents, log_std, self._autoencoder[0].decode(latents)


class MixedPrior(Conditioned):
    """A model's denoiser, of prediction v, with mixing coefficients a of each channel, 0 to 1.

    At first it is the model: what a takes away is put into the last layer.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        weight = bundle.network.module.get_parameter("conv_out.weight")
        self.mixing = nn.Parameter(torch.full((bundle.latent_channels,), _START).to(weight))
        self._last = (bundle.network.module.get_submodule("conv_out"),)
        self._scale(1 / self.a)

    @property
    def a(self) -> Tensor:
        """The coefficients [C]."""
        return self.mixing.sigmoid()

    @torch.no_grad()
    def _scale(self, factor: Tensor) -> None:
        for name, parameter in self._last[0].named_parameters():
            parameter.mul_(factor.view(-1, *[1] * (parameter.ndim - 1)))
            assert name in ("weight", "bias")

    def forward(self, x: Tensor, t: Tensor, words: TextStates) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """a v [B, C, h, w] of z_t [B, C, h, w] at times [B].

        So eps is sigma (1 - a) z_t + a eps', the mixed score of Vahdat et al. 2021:
        a = 0 is the standard normal prior.
        """
        return self.a.view(1, -1, 1, 1) * super().forward(x, t, words).float()

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside the context a is in the model's own last layer: it is a plain model then."""
        before = [parameter.detach().clone() for parameter in self._last[0].parameters()]
        self._scale(self.a.detach())
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._last[0].parameters(), before, strict=True):
                    parameter.copy_(value)
