"""Pixels equal to diffusers.StableDiffusionPipeline on shared tiny weights and noise, both ways."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pag.pipeline_pag_sd import StableDiffusionPAGPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from tiny import tiny_bundle, tower_of, unet_of, vae_of
from torch import Tensor

from latentdiff import PAG, LatentDiffusionPipeline
from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion.prediction import Prediction
from latentdiff.learning.textual_inversion import add_words, save_words

TOLERANCE = 1e-4  # of pixels in [0, 1]; the largest seen is 3e-6
STEPS = 8  # divides 1000: otherwise diffusers' DDIM steps past the times it visits
PROMPTS = ["a red heart", "the flag of a small island"]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp-2m": DPMSolverMultistepScheduler,
}
GUIDANCES: dict[str, dict[str, Any]] = {
    "off": {"guidance_scale": 1.0},
    "on": {"guidance_scale": 5.0},
    "negative": {"guidance_scale": 5.0, "negative_prompt": ["a blue square", "a sad dog"]},
}
# DDIM of diffusers steps to t - 1000 / n whatever the spacing, so it has no true "linspace".
RUNS = [
    (solver, spacing, guidance)
    for solver, spacings in {
        "ddim": ("leading", "trailing", "leading"),
        "euler": ("trailing", "linspace", "leading"),
        "dpmpp-2m": ("linspace", "leading", "trailing"),
    }.items()
    for spacing, guidance in zip(spacings, GUIDANCES, strict=True)
]


def theirs_of(bundle: Bundle, scheduler: object) -> StableDiffusionPipeline:
    """diffusers' pipeline around the same networks."""
    parts: dict[str, Any] = {
        "vae": vae_of(bundle),
        "text_encoder": tower_of(bundle).model,
        "tokenizer": tower_of(bundle).tokenizer,
        "unet": unet_of(bundle),
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def scheduler_of(solver: str, prediction: Prediction, spacing: str) -> Any:
    """A scheduler as Stable Diffusion's folders configure it."""
    own = {"set_alpha_to_one": False, "clip_sample": False} if solver == "ddim" else {}
    return SCHEDULERS[solver](
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing=spacing,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        **own,
    )


def noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(5))


def draw_theirs(pipe: Any, guidance: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    arguments = GUIDANCES[guidance] | {"num_inference_steps": STEPS, "output_type": "np"}
    return pipe(PROMPTS, latents=noise(), **arguments).images


def draw_ours(bundle: Bundle, guidance: str, start: float = 1.0, **more: Any) -> np.ndarray:
    return LatentDiffusionPipeline(bundle)(
        PROMPTS,
        latents=noise() * start,
        num_inference_steps=STEPS,
        output_type="np",
        progress=False,
        **GUIDANCES[guidance],
        **more,
    ).images


def start_of(solver: str, bundle: Bundle) -> float:
    """diffusers' Euler begins "linspace" and "trailing" at sigma times noise, not unit variance."""
    if solver != "euler" or bundle.steps.spacing == "leading":
        return 1.0
    return bundle.timetable(None, STEPS)[0].sigma


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.std() > 0.05  # a picture, not a plain
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    return float(np.abs(ours - theirs).max())


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("solver", "spacing", "guidance"), RUNS)
def test_what_diffusers_saves_draws_the_same_here(
    solver: str, spacing: str, guidance: str, prediction: Prediction, tmp_path: Path
) -> None:
    scheduler = scheduler_of(solver, prediction, spacing)
    theirs = theirs_of(tiny_bundle(prediction=prediction), scheduler)
    theirs.save_pretrained(tmp_path)
    bundle = Bundle.load(tmp_path)
    assert bundle.prediction == prediction
    assert bundle.solver == solver
    ours = draw_ours(bundle, guidance, start_of(solver, bundle))
    assert difference(ours, draw_theirs(theirs, guidance)) <= TOLERANCE


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("solver", SCHEDULERS)
def test_what_is_saved_here_draws_the_same_there(
    solver: str, prediction: Prediction, tmp_path: Path
) -> None:
    process = "vp-scaled-linear-zsnr" if (solver, prediction) == ("ddim", "v") else "vp-linear"
    bundle = tiny_bundle(prediction=prediction, process=process, steps=Steps("trailing"))
    bundle = replace(bundle, solver=solver)
    theirs: Any = StableDiffusionPipeline.from_pretrained(bundle.save(tmp_path / "model"))
    assert type(theirs.scheduler) is SCHEDULERS[solver]
    ours = draw_ours(bundle, "negative", start_of(solver, bundle))
    assert difference(ours, draw_theirs(theirs, "negative")) <= TOLERANCE


def test_a_learned_variance_draws_the_same_there(tmp_path: Path) -> None:
    """Their DDPM, with the noise of the same generator, where it is right: it draws noise in the
    last step if that is not from time 0, and its pipeline sets an offset of 1. (Under guidance
    theirs extrapolates v, too; here, as in GLIDE and DiT, it is the prompt's own.)"""
    bundle = tiny_bundle(steps=Steps("leading", 0), learned_variance=True)
    theirs: Any = StableDiffusionPipeline.from_pretrained(bundle.save(tmp_path / "model"))
    assert isinstance(theirs.scheduler, DDPMScheduler)
    assert theirs.scheduler.config["variance_type"] == "learned_range"
    assert Bundle.load(tmp_path / "model").network.learns_variance
    theirs.scheduler = DDPMScheduler.from_config(theirs.scheduler.config, steps_offset=0)
    theirs.set_progress_bar_config(disable=True)
    start, about = noise()[:1], {"num_inference_steps": STEPS, "guidance_scale": 1.0}
    random = torch.Generator().manual_seed(4)
    drawn = theirs(PROMPTS[:1], latents=start, generator=random, output_type="np", **about).images
    ours = draw_ddpm(bundle, start, **about)
    assert ours.std() > 0.05
    assert np.abs(ours - drawn).max() <= TOLERANCE
    unet_of(bundle).state_dict()["conv_out.bias"][4:] += 1.0
    assert np.abs(draw_ddpm(bundle, start, **about) - ours).max() > 100 * TOLERANCE


def draw_ddpm(bundle: Bundle, start: Tensor, **about: Any) -> np.ndarray:
    return LatentDiffusionPipeline(bundle)(
        PROMPTS[:1], latents=start, seed=4, solver="ddpm", output_type="np", progress=False, **about
    ).images


def test_a_model_of_edm_draws_the_same_there() -> None:
    """Such a network sees x_t over up to 80, and its times lie about 0. Theirs
    begins at sqrt(sigma^2 + 1) times noise."""
    bundle = tiny_bundle(process="edm")
    scheduler = EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")
    theirs = draw_theirs(theirs_of(bundle, scheduler), "negative")
    start = scheduler.init_noise_sigma / bundle.timetable("karras", STEPS)[0].sigma
    ours = draw_ours(bundle, "negative", start, solver="euler", timetable="karras")
    assert difference(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("statistics", ["shift", "channels"])
def test_a_latent_mean_is_folded_into_what_diffusers_reads(statistics: str, tmp_path: Path) -> None:
    bundle = tiny_bundle(statistics=statistics)
    theirs: Any = StableDiffusionPipeline.from_pretrained(bundle.save(tmp_path / "model"))
    ours = draw_ours(bundle, "on")
    assert difference(ours, draw_theirs(theirs, "on")) <= TOLERANCE
    again = Bundle.load(tmp_path / "model")
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (
        again.autoencoder.encode(pictures) - bundle.autoencoder.encode(pictures)
    ).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["off", "negative"])
@pytest.mark.parametrize(
    ("layers", "their_layers"),
    [(("mid_block",), "mid"), (("down_blocks.0", "up_blocks.1.attentions.1"), None)],
)
def test_pag_draws_what_diffusers_draws(
    kind: str, layers: tuple[str, ...], their_layers: str | None, tmp_path: Path
) -> None:
    plain = theirs_of(tiny_bundle(prediction="eps"), scheduler_of("ddim", "eps", "leading"))
    plain.save_pretrained(tmp_path)
    bundle = Bundle.load(tmp_path)
    theirs: Any = StableDiffusionPAGPipeline(
        **plain.components, pag_applied_layers=their_layers or list(layers)
    )
    theirs.set_progress_bar_config(disable=True)
    arguments = GUIDANCES[kind] | {"num_inference_steps": STEPS, "output_type": "np"}
    expected = theirs(PROMPTS, latents=noise(), pag_scale=3.0, **arguments).images
    got = LatentDiffusionPipeline(bundle)(
        PROMPTS,
        latents=noise(),
        solver="ddim",
        edits=[PAG(3.0, layers=layers)],
        progress=False,
        **arguments,
    ).images
    assert difference(got, expected) <= TOLERANCE
    without = LatentDiffusionPipeline(bundle)(
        PROMPTS, latents=noise(), solver="ddim", progress=False, **arguments
    ).images
    assert difference(got, without) > 10 * TOLERANCE


@pytest.mark.parametrize("tokens", [["<mine>"], ["<mine>", "<yours/2>"]])
def test_learned_words_open_in_diffusers_to_the_bit(tokens: list[str], tmp_path: Path) -> None:
    folder = tiny_bundle().save(tmp_path / "model")
    bundle = add_words(Bundle.load(folder), tokens)
    rows = tower_of(bundle).model.get_input_embeddings().get_parameter("rows")
    torch.nn.init.normal_(rows, generator=torch.Generator().manual_seed(0))
    theirs: Any = StableDiffusionPipeline.from_pretrained(folder)
    for path in save_words(bundle, tokens, tmp_path):
        theirs.load_textual_inversion(path)
    ids = theirs.tokenizer.convert_tokens_to_ids(tokens)
    assert torch.equal(theirs.text_encoder.get_input_embeddings().weight[ids], rows)
    (prompt,) = theirs.tokenizer([" ".join(tokens)])["input_ids"]
    assert prompt[1:-1] == ids
