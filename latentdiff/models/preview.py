"""Previews: what latents look like, by one linear map that is fitted to an autoencoder, or by
another autoencoder of the same latents, such as a tiny one."""

import threading
import weakref

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from latentdiff.errors import UserError
from latentdiff.models.autoencoder import Autoencoder

_PICTURES = 32
_SIDE = 8  # latents along a side of each
_known: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@torch.no_grad()
def preview(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Small pictures of latents, about a thousand times cheaper than decoding them.

    The colour of a latent is the least-squares estimate of the mean colour of its pixels from its C
    numbers, fitted once for each autoencoder to coloured shapes as it encodes and decodes them.

    Args:
        autoencoder: of the model.
        latents: [B, C, h, w], standardised, as a run has them.

    Returns:
        [B, 3, h, w] in [-1, 1], float32.
    """
    matrix = colours(autoencoder).to(latents.device)
    values = torch.einsum("bchw,cd->bdhw", latents.float(), matrix[:-1])
    return (values + matrix[-1, :, None, None]).clamp(-1, 1)


def check_same_latents(other: Autoencoder, own: Autoencoder) -> None:
    """Check that an autoencoder decodes latents of a model with another one.

    Raises:
        UserError: its latents have other channels, or stand for other squares of pixels.
    """
    if (other.channels, other.factor) != (own.channels, own.factor):
        raise UserError(
            f"preview: this autoencoder has latents of {other.channels} channels, each of "
            f"{other.factor} x {other.factor} pixels; the model's have {own.channels}, of "
            f"{own.factor} x {own.factor}."
        )


def colours(autoencoder: Autoencoder) -> Tensor:
    """The map [C + 1, 3] from latents and 1 to colours in [-1, 1], fitted when first asked for."""
    with _lock:
        if autoencoder.module not in _known:
            _known[autoencoder.module] = _fitted(autoencoder)
        return _known[autoencoder.module]


def _fitted(autoencoder: Autoencoder) -> Tensor:
    latents = autoencoder.encode(_shapes(_SIDE * autoencoder.factor))
    wanted = avg_pool2d(autoencoder.decode(latents).clamp(-1, 1), autoencoder.factor)
    rows, target = (part.cpu().double().permute(0, 2, 3, 1) for part in (latents, wanted))
    rows = torch.cat([rows, torch.ones_like(rows[..., :1])], 3).flatten(0, 2)
    return torch.linalg.lstsq(rows, target.flatten(0, 2), driver="gelsd").solution.float()


def _shapes(side: int) -> Tensor:
    """Pictures [N, 3, side, side] in [-1, 1] of ellipses, half of them on white."""
    random = torch.Generator().manual_seed(0)
    pictures = torch.ones(_PICTURES, 3, side, side)
    pictures[::2] = torch.rand(len(pictures[::2]), 3, 1, 1, generator=random) * 2 - 1
    places = (torch.arange(side) + 0.5) / side
    for picture in pictures:
        for _ in range(4):
            x, y, wide, high = torch.rand(4, generator=random)
            across = ((places - x) / (0.05 + 0.4 * wide)).square()
            inside = ((places - y) / (0.05 + 0.4 * high)).square()[:, None] + across < 1
            picture[:, inside] = (torch.rand(3, generator=random) * 2 - 1)[:, None]
    return pictures
