"""Runs that diffusers' pipelines and ours both make: their parts, solvers, noise and pictures."""

import copy
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from tiny import noise_picture, tiny_bundle, tower_of, unet_of, vae_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle, Steps

picture = noise_picture
TOLERANCE = 1e-4  # of pixels in [0, 1]
_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SCHEDULERS: dict[str, Any] = {
    "ddim": lambda: DDIMScheduler(**_SCHEDULE, set_alpha_to_one=False, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**_SCHEDULE),
    "dpmpp-2m": lambda: DPMSolverMultistepScheduler(**_SCHEDULE),
}


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stable_diffusion() -> Bundle:
    """A tiny model with the schedule and the steps of Stable Diffusion 1."""
    return tiny_bundle(prediction="eps", steps=Steps("leading", 1, False))


def parts(bundle: Bundle) -> dict[str, Any]:
    """What a pipeline of diffusers is made of; its U-Net may be changed."""
    return {
        "vae": vae_of(bundle),
        "text_encoder": tower_of(bundle).model,
        "tokenizer": tower_of(bundle).tokenizer,
        "unet": copy.deepcopy(unet_of(bundle)),
        "scheduler": SCHEDULERS["ddim"](),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def theirs(pipe: Any, solver: str, **call: Any) -> np.ndarray:
    """Pictures [B, H, W, 3] in [0, 1] of a pipeline of diffusers."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[solver]()
    return pipe(**call, output_type="np").images


def ours(bundle: Bundle, solver: str, **call: Any) -> np.ndarray:
    """Pictures [B, H, W, 3] in [0, 1] of ours."""
    pipe = LatentDiffusionPipeline(bundle)
    pipe.scheduler = SCHEDULERS[solver]()
    return pipe(**call, output_type="np", progress=False).images


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.std() > 0.05  # a picture, not a plain
    assert np.abs(got - wanted).max() <= TOLERANCE
