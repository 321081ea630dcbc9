"""One tiny model, drawn by diffusers' pipeline and by ours from the same saved scheduler config.

The group norms have four channels a group, so that the networks see the time: with one, they would
erase its embedding. Latents are 8 x 8, pictures 16 x 16.
"""

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from tiny import WIDTH, tiny_clip
from torch import Tensor

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.diffusion.process import Flow
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config

THEIRS: Any = diffusers
Keys = Mapping[str, object]
TOLERANCE = 1e-4  # of pixels in [0, 1]
PROMPT, SCALE, SEED = "a red heart", 4.0, 3
SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
# Classes in sigma whose first x is noise times sigma unless the spacing is "leading".
IN_SIGMA = ("Euler", "EulerAncestral", "Heun", "KDPM2", "KDPM2Ancestral", "LMS")


@cache
def bundle() -> Bundle:
    """The networks, whose scheduler is replaced by that of each comparison."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
        )
        vae: Any = THEIRS.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        text = tiny_clip()
    for network in (unet, vae, text.model):
        network.eval().requires_grad_(False)
    process, prediction, steps, solver = scheduler_config.read(
        {"_class_name": "DDIMScheduler", **SD}, "made"
    )
    return Bundle(vae, unet, text, process, prediction, steps, solver)


def noise() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what diffusers says of deprecated configs."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def save(config: Keys, folder: Path) -> Path:
    """A model folder's two files that say how it is sampled."""
    place = folder / "scheduler"
    place.mkdir(parents=True, exist_ok=True)
    (place / "scheduler_config.json").write_text(json.dumps(dict(config)))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", config["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def theirs(folder: Path, steps: int, **call: Any) -> np.ndarray:
    """The picture that diffusers draws with the scheduler of a folder, [1, 16, 16, 3] in [0, 1]."""
    kind = json.loads((folder / "model_index.json").read_text())["scheduler"][1]
    with quiet():
        scheduler = getattr(THEIRS, kind).from_pretrained(folder, subfolder="scheduler")
        if not hasattr(scheduler, "init_noise_sigma"):
            scheduler.init_noise_sigma = 1.0  # of flow; their pipelines for it ask for none
        model = bundle()
        parts: dict[str, Any] = {
            "vae": model.vae,
            "text_encoder": model.text.model,
            "tokenizer": model.text.tokenizer,
            "unet": model.unet,
            "scheduler": scheduler,
            "safety_checker": None,
            "feature_extractor": None,
        }
        pipe: Any = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=SCALE,
            latents=noise(),
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
            **call,
        ).images


def read(folder: Path) -> Bundle:
    """The shared networks with the scheduler of a folder.

    Raises:
        UserError: it is refused.
    """
    process, prediction, steps, solver = scheduler_config.read_folder(folder)
    return dataclasses.replace(
        bundle(), process=process, prediction=prediction, steps=steps, solver=solver
    )


def ours(folder: Path, steps: int) -> np.ndarray:
    """The picture that is drawn here.

    Raises:
        UserError: the config is refused.
    """
    return draw(read(folder), steps, start_of(folder, steps))


def draw(model: Bundle, steps: int, start: float = 1.0, **call: Any) -> np.ndarray:
    return LatentDiffusionPipeline(model)(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=SCALE,
        latents=noise() * start,
        seed=SEED,
        output_type="np",
        progress=False,
        **call,
    ).images


def start_of(folder: Path, steps: int) -> float:
    """The first x over unit variance.

    x = alpha x_0 + sigma noise has the variance alpha^2 + sigma^2 = 1 for data of unit variance,
    as diffusers' own DDIM begins. Its classes in sigma begin at sigma times noise, the noise's
    share alone, but for "leading", where they, too, begin at sqrt(sigma^2 + 1).
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kind = str(config["_class_name"]).removesuffix("Scheduler").removesuffix("Discrete")
    if kind not in IN_SIGMA or config.get("timestep_spacing", "linspace") == "leading":
        return 1.0
    return read(folder).plan(steps)[1][0].sigma


def difference(config: Keys, steps: int, folder: Path, **call: Any) -> float:
    """The largest difference of a pixel; inf where only one of both is finite.

    Raises:
        UserError: refused here.
    """
    save(config, folder)
    mine = ours(folder, steps)
    other = theirs(folder, steps, **call)
    assert other.std() > 0.02  # a picture, not a plain
    return float(np.abs(mine - other).max())


def is_flow(config: Keys, folder: Path) -> bool:
    return isinstance(scheduler_config.read_folder(save(config, folder))[0], Flow)


def refusal(config: Keys, folder: Path) -> str | None:
    """The line with which a config is refused, if it is."""
    try:
        scheduler_config.read_folder(save(config, folder))
    except UserError as error:
        return str(error)
    return None
