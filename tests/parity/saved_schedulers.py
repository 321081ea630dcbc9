"""One tiny model, drawn by diffusers' pipeline and by ours from the same saved scheduler config."""

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
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from tiny import tiny_bundle, tower_of, unet_of, vae_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.formats import scheduler_config
from latentdiff.formats.scheduler_classes import CLASSES

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
    process, prediction, steps, solver = scheduler_config.read(
        {"_class_name": "DDIMScheduler", **SD}, "made"
    )
    made = tiny_bundle(prediction=prediction, process=process, steps=steps)
    return dataclasses.replace(made, solver=solver)


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
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    with quiet():
        scheduler = getattr(THEIRS, kind).from_pretrained(folder, subfolder="scheduler")
        if not hasattr(scheduler, "init_noise_sigma"):
            scheduler.init_noise_sigma = 1.0  # of flow; their pipelines for it ask for none
        model = bundle()
        parts: dict[str, Any] = {
            "vae": vae_of(model),
            "text_encoder": tower_of(model).model,
            "tokenizer": tower_of(model).tokenizer,
            "unet": unet_of(model),
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
    """Their first x over ours, which has the variance alpha^2 + sigma^2 of the first level.

    That is the variance of alpha x_0 + sigma noise for data of unit variance. Their classes in
    sigma begin at sigma times noise, the noise's share alone, unless the spacing is "leading";
    all others at 1, which alpha^2 + sigma^2 is but in a rectified flow.
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kind = str(config["_class_name"]).removesuffix("Scheduler").removesuffix("Discrete")
    model = read(folder)
    first = model.plan(steps)[1][0]
    shares = kind in IN_SIGMA and config.get("timestep_spacing", "linspace") != "leading"
    return (first.sigma if shares else 1.0) / model.process.prior_scale(first)


def excuse(config: Keys, steps: int) -> str | None:
    """Why diffusers' picture is not the right one, where it is not: docs/schedulers.md has more."""
    kind = str(config["_class_name"]).removesuffix("Scheduler")
    given = {**CLASSES[str(config["_class_name"])].defaults, **config}
    count = given["num_train_timesteps"]
    assert isinstance(count, int)
    if kind in ("DDIM", "DDIMParallel", "PNDM"):
        even = given["timestep_spacing"] == "trailing" and count % steps == 0
        if given["timestep_spacing"] != "leading" and not even:
            return "x moves to t - T // n, the network is asked at another time"
    if kind == "PNDM" and given["prediction_type"] == "v_prediction":
        return "v of several times is averaged, not the noise that they mean"
    if kind == "PNDM" and not given["skip_prk_steps"] and count // steps % 2:
        return "half of an odd step is rounded up in one place and down in the other"
    if kind == "DPMSolverMultistep" and given["solver_order"] == 3:
        return "half of the second derivative is taken for all of it"
    if kind == "UniPCMultistep" and given["solver_type"] == "bh1":
        return "infinity times 0 in the step to clean data"
    if kind.startswith("DDPM") and given["variance_type"] == "fixed_large":
        return "the last step draws the noise of the kernel"
    flow = CLASSES[str(config["_class_name"])].family == "flow" or given.get("use_flow_sigmas")
    if given.get("prediction_type") == "flow_prediction" and not flow:
        return "sigma / alpha is taken for sigma"
    return None


def agrees(config: Keys, steps: int, folder: Path) -> bool | None:
    """Whether both draw the same picture; None where diffusers draws none, or not the right one.

    Raises:
        UserError: refused here.
    """
    save(config, folder)
    mine = ours(folder, steps)
    assert np.isfinite(mine).all()
    if excuse(config, steps) is not None:
        return None
    call = {"eta": 0.3} if config["_class_name"] == "TCDScheduler" else {}
    try:
        other = theirs(folder, steps, **call)
    except Exception:  # of any kind, for a value that the class has not
        return None
    if not np.isfinite(other).all():  # eps of pure noise says nothing of x_0
        return None
    assert other.std() > 0.02  # a picture, not a plain
    return bool(np.abs(mine - other).max() <= TOLERANCE)


def refusal(config: Keys, folder: Path) -> str | None:
    """The line with which a config is refused, if it is."""
    try:
        read(save(config, folder))
    except UserError as error:
        return str(error)
    return None
