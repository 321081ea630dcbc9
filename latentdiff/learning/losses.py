"""Losses of both stages."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.diffusion.prediction import Prediction
from latentdiff.diffusion.process import Process
from latentdiff.errors import UserError


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017, eq. 3): logits of any shape -> scalar."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """lambda = |grad rec| / (|grad adv| + delta) at the decoder's last layer.

    Esser et al. 2021 (VQGAN), eq. 7, with delta = 1e-4 and the clamp to [0, 1e4] of their code.

    Args:
        reconstruction, adversarial: the two loss terms, scalars with a graph.
        last_layer: the weight of the decoder's last convolution.
    """
    (of_rec,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adv,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (of_rec.norm() / (of_adv.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def min_snr_gamma(
    gamma: float | Literal["auto"] | None, prediction: Prediction, process: Process
) -> float | None:
    """Gamma of the loss weights: "auto" is 5 for eps and x0, else None.

    On v, min-SNR weights are nearly 0 in much noise, where what a picture shows is decided, and in
    little noise. Uniform weights on v are SNR + 1 on x0 (Salimans & Ho 2022, sec. 4). It is None,
    too, where the last time has no signal: min-SNR weights would be 0 there, and what sampling
    begins with would never be learned (Lin et al. 2024, sec. 3.2, weigh uniformly).

    Raises:
        UserError: the weighting is not defined for the prediction type of the model.
    """
    defined = prediction in ("eps", "x0", "v")
    if gamma == "auto":
        weighed = prediction in ("eps", "x0") and process.level(process.t_max).alpha > 0
        return 5.0 if weighed else None
    if gamma is not None and not defined:
        raise UserError(
            f"objective.min_snr_gamma is for eps, x0 and v, and this model predicts "
            f"{prediction}: set it to null"
        )
    return gamma


def min_snr_weight(log_snr: Tensor, prediction: str, gamma: float = 5.0) -> Tensor:
    """Min-SNR weights for a loss on the network's own output (Hang et al. 2023, sec. 3.4).

    The weight on x0 is min(SNR, gamma); an x0 loss is an eps loss / SNR and a v loss / (SNR + 1).

    Args:
        log_snr: [B], of the drawn times.
        prediction: "eps", "x0" or "v".

    Returns:
        Weights [B].

    Raises:
        ValueError: the weighting is not defined for this prediction.
    """
    snr = log_snr.double().exp()
    on_x0 = snr.clamp(max=gamma)
    if prediction == "x0":
        return on_x0.float()
    if prediction == "eps":
        return torch.where(snr > 0, on_x0 / snr.clamp(min=1e-12), torch.ones_like(snr)).float()
    if prediction == "v":
        return (on_x0 / (snr + 1.0)).float()
    raise ValueError(f"min-SNR weighting is for eps, x0 or v, not for {prediction!r}")


def weighted_mse(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean of per-picture squared errors times weights: [B, ...], [B, ...], [B] -> scalar."""
    return ((output.float() - target.float()).square().flatten(1).mean(1) * weights).mean()


def weighted_loss(
    output: Tensor,
    target: Tensor,
    weights: Tensor,
    huber: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`weighted_mse`, or another loss of the errors, or of a part of each picture.

    Args:
        output, target: [B, C, h, w].
        weights: [B].
        huber: c of the pseudo-Huber loss 2 c (sqrt(e^2 + c^2) - c) in place of e^2: e^2 where the
            error is far below c and 2 c |e| far above, so that a few wrong pixels or pictures say
            less (Charbonnier et al. 1997; Khrapov et al. 2024, for diffusion).
        mask: how much each place counts [B, 1, h, w]; a picture's loss is the mean over them.

    Returns:
        A scalar.
    """
    errors = (output.float() - target.float()).square()
    if huber is not None:
        errors = 2 * huber * ((errors + huber**2).sqrt() - huber)
    if mask is None:
        return (errors.flatten(1).mean(1) * weights).mean()
    mask = mask.expand_as(errors)
    of_pictures = (errors * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)
    return (of_pictures * weights).mean()


def contrastive(pictures: Tensor, texts: Tensor, temperature: Tensor) -> Tensor:
    """Radford et al. 2021 (CLIP), figure 3: each picture's own text, and each text's own picture.

    Args:
        pictures, texts: unit vectors [B, D] of pairs; the others of the batch are the wrong ones.
        temperature: factor of the cosines, a scalar.

    Returns:
        The mean cross-entropy of both directions, a scalar.
    """
    logits = temperature * pictures.float() @ texts.float().T
    own = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
