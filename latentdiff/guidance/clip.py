"""CLIP: how well pictures and texts agree, with gradients to the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from latentdiff.errors import UserError
from latentdiff.formats.diffusers_save import save_tokenizer, write_config, writing_model
from latentdiff.formats.weights import (
    WeightFiles,
    build,
    check_numbers,
    fill,
    read_json,
    save_weights,
    weight_files,
)
from latentdiff.models.text_encoders import ClipTower, Tokenizer

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPModel

# Of OpenAI's CLIP, which every CLIP without a preprocessor_config.json takes over.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP out of transformers with its tokenizer. Threads may share it.

    Attributes:
        model: frozen, in evaluation mode.
        tokenizer: the tokenizer of its text tower.
        mean: mean of RGB pictures in [0, 1].
        std: likewise.
    """

    model: "CLIPModel"
    tokenizer: Tokenizer
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read a folder as transformers writes `CLIPModel` and its processor: safetensors only.

        Raises:
            UserError: anything is missing, damaged, or no CLIP.
        """
        from transformers.models.clip.modeling_clip import CLIPModel

        from latentdiff.formats.tokenizer_files import load_tokenizer

        folder = Path(folder)
        path = folder / "config.json"
        config = read_json(path)
        check_numbers(config, str(path))
        if config.get("model_type") != "clip" or "vision_config" not in config:
            raise UserError(f"{path}: it describes no CLIP of an image and a text tower.")
        files = WeightFiles(weight_files(folder, "model"), _name)
        model = build(lambda: CLIPModel(_config(config)), str(path), files, _layers(config))
        fill(model, files, torch.float32, torch.device(device))
        given = folder / "preprocessor_config.json"
        look = read_json(given) if given.is_file() else {}
        mean, std = (_channels(look, key, given) for key in ("image_mean", "image_std"))
        return cls(model, load_tokenizer(folder, "CLIPTokenizer"), mean or _MEAN, std or _STD)

    @property
    def side(self) -> int:
        """Side in pixels of the pictures that the image tower takes."""
        config: Any = self.model.config
        return config.vision_config.image_size

    @property
    def temperature(self) -> float:
        """Factor between a cosine similarity and a logit: CLIP's `logit_scale`."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] of texts; what is beyond the window is left out."""
        tower = ClipTower(self.model.text_model, self.tokenizer)
        return self.embed(tower.tokenize(prompts).ids.to(self.model.device))

    def embed(self, ids: Tensor) -> Tensor:
        """Unit vectors [N, D] of texts as token ids [N, L], with gradients."""
        model: Any = self.model
        pooled = model.text_model(input_ids=ids).pooler_output
        return normalize(model.text_projection(pooled), dim=-1)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Unit vectors [N, D] of pictures [N, 3, H, W] about [-1, 1], with gradients.

        As CLIP's processor does, the shorter side is brought to the tower's size and the middle
        square is taken.
        """
        model: Any = self.model
        side = self.side
        unit = pictures.to(model.device) / 2 + 0.5
        height, width = unit.shape[-2:]
        if min(height, width) != side:
            size = [side * part // min(height, width) for part in (height, width)]
            unit = interpolate(unit, size, mode="bicubic", antialias=True)
        top, left = ((length - side) // 2 for length in unit.shape[-2:])
        unit = unit[..., top : top + side, left : left + side]
        mean, std = (unit.new_tensor(part).view(3, 1, 1) for part in (self.mean, self.std))
        pooled = model.vision_model(pixel_values=(unit - mean) / std).pooler_output
        return normalize(model.visual_projection(pooled), dim=-1)

    def score(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """Cosine [N] of pictures [N, 3, H, W] about [-1, 1] and unit vectors [N, D] of texts."""
        return (self.pictures(pictures) * texts).sum(-1)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the folder that `load`, and `CLIPModel.from_pretrained`, read.

        The folder of a network that is there already is replaced.

        Raises:
            UserError: it cannot be written, or something else is there.
        """
        folder = Path(folder)
        with writing_model(folder, "config.json") as stage:
            self.model.config.save_pretrained(stage)
            save_weights(dict(self.model.state_dict()), stage / "model.safetensors", dtype)
            save_tokenizer(self.tokenizer, stage)
            self.tokenizer.backend_tokenizer.model.save(str(stage))
            look: dict[str, object] = {
                "image_processor_type": "CLIPImageProcessor",
                "image_mean": list(self.mean),
                "image_std": list(self.std),
                "size": {"shortest_edge": self.side},
                "crop_size": {"height": self.side, "width": self.side},
            }
            write_config(look, stage / "preprocessor_config.json")
        return folder


def _config(config: dict[str, Any]) -> Any:
    """Only what the architecture itself needs: see `formats.diffusers_folder`."""
    from transformers.models.clip.configuration_clip import (
        CLIPConfig,
        CLIPTextConfig,
        CLIPVisionConfig,
    )

    from latentdiff.formats.diffusers_folder import known

    towers = {
        "text_config": CLIPTextConfig(**known(config.get("text_config") or {}, CLIPTextConfig)),
        "vision_config": CLIPVisionConfig(**known(config["vision_config"] or {}, CLIPVisionConfig)),
    }
    sizes = {key: config[key] for key in ("projection_dim",) if key in config}
    return CLIPConfig(**towers, **sizes)


def _layers(config: dict[str, Any]) -> int:
    towers = (config.get("text_config"), config.get("vision_config"))
    counts = (tower.get("num_hidden_layers", 12) for tower in towers if isinstance(tower, dict))
    return sum(count for count in counts if isinstance(count, int))


def _name(stored: str) -> str | None:
    return None if stored.endswith("embeddings.position_ids") else stored


def _channels(look: dict[str, object], key: str, path: Path) -> tuple[float, ...] | None:
    value = look.get(key)
    if value is None:
        return None
    least = 1e-6 if key == "image_std" else -1e3
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(part, int | float) and least <= part < 1e3 for part in value)
    ):
        raise UserError(
            f"{path}: its {key} must be three numbers (a deviation above 0), not {value!s:.60}."
        )
    return tuple(float(part) for part in value)
