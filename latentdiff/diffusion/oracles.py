"""Denoisers in closed form: data whose E[x_0 | x_t] is known exactly, to test and to learn with.

Each pixel of a picture is an independent vector of C channels: x [B, C, H, W] is B * H * W draws.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Estimate
from latentdiff.diffusion.process import NoiseLevel


class GaussianMixture:
    """The exact denoiser of a mixture of Gaussians.

    Args:
        weights: [K] positive numbers; only their proportions count.
        means: [K, C].
        covariances: [K, C, C], symmetric, eigenvalues >= 0.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        self.log_weights = (weights / weights.sum()).log()
        self.means = means
        self.variances, self.axes = torch.linalg.eigh(covariances)  # [K, C], [K, C, C]

    def __call__(self, x: Tensor, level: NoiseLevel) -> Estimate:
        """E[x_0 | x_t]: the components' posterior means, weighted by their responsibilities.

        Component k of x_t is N(alpha m_k, alpha^2 S_k + sigma^2 I), and its posterior mean is
        m_k + alpha S_k (alpha^2 S_k + sigma^2 I)^-1 (x_t - alpha m_k).

        Args:
            x: [B, C, H, W], in the dtype of the mixture.
            level: its level, with sigma > 0 or every covariance positive.

        Returns:
            x0 [B, C, H, W], and no variance.
        """
        spread = level.alpha**2 * self.variances + level.sigma**2
        centred = x[:, None] - level.alpha * self.means[:, :, None, None]
        along = torch.einsum("kcd,bkchw->bkdhw", self.axes, centred)
        exponent = (along**2 / spread[:, :, None, None]).sum(2) + spread.log().sum(1)[:, None, None]
        share = (self.log_weights[:, None, None] - 0.5 * exponent).softmax(1)
        pulled = (level.alpha * self.variances / spread)[:, :, None, None] * along
        x0 = torch.einsum("kcd,bkdhw->bkchw", self.axes, pulled) + self.means[:, :, None, None]
        return Estimate((share[:, :, None] * x0).sum(1))


class Gaussian(GaussianMixture):
    """The exact denoiser of a Gaussian, and the exact probability flow with it.

    Args:
        mean: [C].
        covariance: [C, C], symmetric, eigenvalues >= 0.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__(torch.ones_like(mean[:1]), mean[None], covariance[None])

    def flow(self, x: Tensor, here: NoiseLevel, there: NoiseLevel) -> Tensor:
        """Solve the probability-flow ODE (Song et al. 2021, eq. 13) exactly from `here` to `there`.

        Along each axis of the covariance, the distance from the mean grows as the standard
        deviation of x_t does.

        Args:
            x: [B, C, H, W] at `here`.
            here: a level with sigma > 0, or any if the covariance is positive.
            there: any level.

        Returns:
            [B, C, H, W] at `there`.
        """
        mean, variance, axes = self.means[0], self.variances[0], self.axes[0]
        growth = (there.alpha**2 * variance + there.sigma**2).sqrt()
        growth = growth / (here.alpha**2 * variance + here.sigma**2).sqrt()
        matrix = (axes * growth) @ axes.T
        moved = torch.einsum("cd,bdhw->bchw", matrix, x - here.alpha * mean[:, None, None])
        return moved + there.alpha * mean[:, None, None]


def mixture(
    weights: Sequence[float], means: Sequence[Sequence[float]], stds: Sequence[float]
) -> GaussianMixture:
    """A float64 mixture of K round Gaussians, from K weights, K means of C numbers and K stds."""
    centres = torch.tensor(means, dtype=torch.float64)
    eye = torch.eye(centres.shape[1], dtype=torch.float64)
    variances = torch.tensor(stds, dtype=torch.float64) ** 2
    return GaussianMixture(
        torch.tensor(weights, dtype=torch.float64), centres, variances[:, None, None] * eye
    )
