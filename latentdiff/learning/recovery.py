"""Energy-based models learned by diffusion recovery likelihood: Gao et al. 2021.

f(x, t) is the log-density of x_t up to a constant. What is maximised is the likelihood of x at a
level given x at the next noisier one, p(x_there | x_here), from which a few steps of Langevin
dynamics draw well: the noisier x holds the draw near it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.learning.denoising import Conditioned
from latentdiff.learning.denoising_gan import kernel
from latentdiff.learning.distillation import Levels
from latentdiff.models.cross_attention_unet import EnergyUNet
from latentdiff.models.text_encoders import TextStates, Tokens
from latentdiff.solvers.langevin import draw_cleaner


class ConditionedEnergy(Conditioned):
    """An energy with its conditioner as one module: log-densities of pictures under captions.

    Raises:
        ValueError: the model is no energy.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        if not isinstance(bundle.network.module, EnergyUNet):
            raise ValueError(f"{bundle.name} is no energy")
        self.energy = bundle.network.module

    def forward(self, x: Tensor, t: Tensor, words: Tokens | TextStates) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """f [B] of x_t [B, C, h, w] at times [B]."""
        (bundle,) = self._bundle
        text = bundle.conditioner.states(words) if isinstance(words, Tokens) else words
        size = x.shape[-2] * bundle.factor, x.shape[-1] * bundle.factor
        told = bundle.conditioner.condition(text, size)
        assert told.states is not None
        mask = None if told.mask is None else told.mask.to(x.device)
        return self.energy.log_density(x, t, told.states.to(x), mask)


def recovery_langevin(
    log_density: Callable[[Tensor], Tensor],
    x: Tensor,
    here: Levels,
    there: Levels,
    noise: Tensor,
    size: float,
) -> Tensor:
    """Draw from p(x_there | x_here) as the energy has it: see `latentdiff.solvers.langevin`.

    Args:
        log_density: f at `there`, [B, C, h, w] -> [B].
        x: x_here [B, C, h, w].
        here, there: the noisier and the cleaner level of each picture.
        noise: standard normal [K, B, C, h, w], a draw for each step.
        size: of a step, as a share of the variance of what is drawn.

    Returns:
        x_there [B, C, h, w], without a graph.
    """

    def score(cleaner: Tensor) -> Tensor:
        with torch.enable_grad():
            cleaner = cleaner.detach().requires_grad_()
            return torch.autograd.grad(log_density(cleaner).sum(), cleaner)[0]

    with torch.no_grad():
        return draw_cleaner(score, x, *kernel(there, here), noise, size)


def recovery_loss(of_data: Tensor, of_draws: Tensor) -> Tensor:
    """The mean of f [B] over draws less that over data, whose gradient is that of the negative
    recovery log-likelihood: Gao et al. 2021."""
    return of_draws.mean() - of_data.mean()
