"""Perceptual distances: one that needs no download, and LPIPS when its weights are there."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdiff.errors import UserError


class FeatureDistance(nn.Module):
    """Distance of channel-normalised features, as LPIPS (Zhang et al. 2018, eq. 1).

    `stages` are run one after the other; each one's output is compared. Parameters are frozen, but
    gradients flow to the pictures.
    """

    def __init__(self, stages: list[nn.Module], heads: list[Tensor] | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        for number, head in enumerate(heads or []):
            self.register_buffer(f"head{number}", head)
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> distances [B]."""
        features = torch.cat([a, b])
        total = torch.zeros(len(a), device=a.device)
        for number, stage in enumerate(self.stages):
            features = stage(features)
            unit = (
                features.float() * features.float().square().sum(1, keepdim=True).add(1e-8).rsqrt()
            )
            gap = (unit[: len(a)] - unit[len(a) :]).square()
            head = self._buffers.get(f"head{number}")
            total = total + (gap if head is None else gap * head).sum(1).mean((1, 2))
        return total


def random_features(seed: int = 0, widths: tuple[int, ...] = (16, 32, 64)) -> FeatureDistance:
    """A VGG-shaped network with fixed random weights: nothing to download.

    Random features suffice for a perceptual loss (Liu et al. 2021, "A generic perceptual loss for
    modeling structured output dependencies", sec. 3.2).
    """
    random = torch.Generator().manual_seed(seed)
    stages: list[nn.Module] = []
    width = 3
    for number, wider in enumerate(widths):
        first, second = nn.Conv2d(width, wider, 3, 1, 1), nn.Conv2d(wider, wider, 3, 1, 1)
        for conv in (first, second):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=random)
            nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
        pool = [nn.AvgPool2d(2)] if number else []
        stages.append(nn.Sequential(*pool, first, nn.ReLU(), second, nn.ReLU()))
        width = wider
    return FeatureDistance(stages)


VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def lpips(weights: Path) -> FeatureDistance:
    """LPIPS with VGG-16 from one safetensors file.

    The file holds torchvision's VGG-16 keys (`features.0.weight` ...) and LPIPS's linear heads
    (`lin0.model.1.weight` ... [1, C, 1, 1]).

    Raises:
        UserError: the file is missing, damaged, or lacks a key.
    """
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read LPIPS weights from {weights}: {error}") from None
    try:
        stages = [_vgg_stage(state, indices) for indices in VGG_STAGES]
        heads = [state[f"lin{number}.model.1.weight"] for number in range(len(stages))]
    except KeyError as error:
        raise UserError(f"{weights} is not an LPIPS VGG-16 file: it lacks {error}") from None
    stages[0] = nn.Sequential(_LpipsScale(), stages[0])
    return FeatureDistance(stages, heads)


def _vgg_stage(state: dict[str, Tensor], indices: tuple[int, ...]) -> nn.Module:
    parts: list[nn.Module] = [] if indices[0] == 0 else [nn.MaxPool2d(2)]
    for index in indices:
        weight = state[f"features.{index}.weight"]
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, 1, 1)
        conv.load_state_dict({"weight": weight, "bias": state[f"features.{index}.bias"]})
        parts += [conv, nn.ReLU()]
    return nn.Sequential(*parts)


class _LpipsScale(nn.Module):
    """LPIPS's scaling layer: [-1, 1] to ImageNet's mean and deviation."""

    def forward(self, x: Tensor) -> Tensor:
        shift = x.new_tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = x.new_tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        return (x - shift) / scale


def create(name: str) -> FeatureDistance:
    """`random`, or the path of an LPIPS safetensors file."""
    return random_features() if name == "random" else lpips(Path(name))
