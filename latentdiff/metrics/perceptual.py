"""Perceptual distances: one that needs no download, and LPIPS when its weights are there."""

from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.formats.weights import WeightFiles, build, fill


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
VGG_WIDTHS = (64, 128, 256, 512, 512)


def lpips(weights: Path) -> FeatureDistance:
    """LPIPS with VGG-16 from one safetensors file.

    The file holds torchvision's VGG-16 keys (`features.0.weight` ...) and LPIPS's linear heads
    (`lin0.model.1.weight` ... [1, C, 1, 1]). VGG's `classifier` may be there, too.

    Raises:
        UserError: the file is missing, damaged, or holds other tensors than these.
    """
    files = WeightFiles([weights], _lpips_name)
    network = build(_lpips_layers, str(weights), files, layers=1)
    layers = dict(fill(network, files, torch.float32, torch.device("cpu")).named_modules())
    stages: list[nn.Module] = []
    for number, indices in enumerate(VGG_STAGES):
        parts: list[nn.Module] = [nn.MaxPool2d(2) if number else _LpipsScale()]
        for index in indices:
            parts += [layers[f"features.{index}"], nn.ReLU()]
        stages.append(nn.Sequential(*parts))
    heads = [layers[f"lin{n}"].get_parameter("weight").detach() for n in range(len(stages))]
    return FeatureDistance(stages, heads)


def _lpips_layers() -> nn.ModuleDict:
    """The layers that have weights, by about the names of the file."""
    features, heads = nn.ModuleDict(), nn.ModuleDict()
    width = 3
    for number, indices in enumerate(VGG_STAGES):
        for index in indices:
            features[str(index)] = nn.Conv2d(width, VGG_WIDTHS[number], 3, 1, 1)
            width = VGG_WIDTHS[number]
        heads[f"lin{number}"] = nn.Conv2d(width, 1, 1, bias=False)
    return nn.ModuleDict({"features": features, **heads})


def _lpips_name(stored: str) -> str | None:
    return None if stored.startswith("classifier.") else stored.replace(".model.1.", ".")


class _LpipsScale(nn.Module):
    """LPIPS's scaling layer: [-1, 1] to ImageNet's mean and deviation."""

    def forward(self, x: Tensor) -> Tensor:
        shift = x.new_tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = x.new_tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        return (x - shift) / scale


def create(name: str) -> FeatureDistance:
    """`random`, or the path of an LPIPS safetensors file."""
    return random_features() if name == "random" else lpips(Path(name))
