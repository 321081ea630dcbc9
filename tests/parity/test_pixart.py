"""Pixels equal to diffusers' pipelines of PixArt, on the same tiny networks and noise.

`models/test_tiny_sees_everything.py` measures that each input of these networks moves the output.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from tiny import PIXART_SCHEDULER, draw_weights, tiny_pixart
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition
from latentdiff.errors import UserError
from latentdiff.models.attention import Attention, set_attention
from latentdiff.models.pixart_transformer import PixArtTransformer

TOLERANCE = 1e-4  # of pixels in [0, 1]; the largest seen is 2.1e-5, Euler's
STEPS = 8  # divides 1000: otherwise diffusers' DDIM steps past the times it visits
LONG = " ".join(["two people holding hands in the face of a sad dog, flat style"] * 9)
PROMPTS = ["a Red heart", LONG]
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    "euler": EulerDiscreteScheduler(),
    "dpmpp-2m": DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER),
}
KINDS: dict[str, dict[str, Any]] = {
    "alpha": {},
    "alpha of 1024 pixels": {"sizes": True},
    "sigma": {"sigma": True},
}
TEXTS: dict[str, dict[str, Any]] = {
    "off": {"guidance_scale": 1.0},
    "negative": {"guidance_scale": 4.0, "negative_prompt": ["a blue square", "a sad dog"]},
}


def noise() -> Tensor:
    return torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(5))


def theirs_of(folder: Path, solver: str | None = None) -> Any:
    """The pipeline of diffusers that a folder names."""
    named = json.loads((folder / "model_index.json").read_text())["_class_name"]
    kind: Any = {k.__name__: k for k in (PixArtAlphaPipeline, PixArtSigmaPipeline)}[named]
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if solver is not None:
        pipe.scheduler = SCHEDULERS[solver]
    return pipe


def drawn_by(pipe: Any, **call: Any) -> np.ndarray:
    """Pictures of the size that is asked for, as ours are, of prompts as they are."""
    size = {"height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False}
    given = {"num_inference_steps": STEPS, "latents": noise(), "output_type": "np", **size, **call}
    return pipe(**{"prompt": PROMPTS, **given}).images


def ours(bundle: Bundle, **call: Any) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "output_type": "np", "progress": False, **call}
    given = {"latents": noise(), "height": 16, "width": 16, **given}
    given |= {} if "prompt_embeds" in given else {"prompt": call.get("prompt", PROMPTS)}
    return LatentDiffusionPipeline(bundle)(**given).images


def difference(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.std() > 0.05  # a picture, not a plain
    return float(np.abs(got - wanted).max())


@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_draw_the_same_whoever_wrote_the_folder(
    kind: str, solver: str, tmp_path: Path
) -> None:
    """Prompts in capitals, one longer than alpha reads; a saved folder draws the same there."""
    theirs = theirs_of(tiny_pixart(**KINDS[kind]).save(tmp_path / "ours"), solver)
    theirs.save_pretrained(tmp_path / "theirs")
    bundle = Bundle.load(tmp_path / "theirs")
    assert (bundle.family, bundle.solver, bundle.prediction) == ("pixart", solver, "eps")
    assert bundle.conditioner.window == (300 if kind == "sigma" else 120)
    wanted = {text: drawn_by(theirs, **said) for text, said in TEXTS.items()}
    for text, said in TEXTS.items():
        assert difference(ours(bundle, **said), wanted[text]) <= TOLERANCE
    assert len(bundle.conditioner.tokenize(PROMPTS).cut[1]) > 9 or kind == "sigma"
    again = theirs_of(bundle.save(tmp_path / "again"))
    assert difference(drawn_by(again, **TEXTS["negative"]), wanted["negative"]) == 0


def test_what_is_read_matters() -> None:
    """The window, in which the two differ, and the case of letters."""
    alpha, said = tiny_pixart(), {"guidance_scale": 4.0}
    pictures = ours(alpha, **said)
    assert difference(ours(tiny_pixart(sigma=True), **said)[1:], pictures[1:]) > 10 * TOLERANCE
    assert difference(ours(tiny_pixart(window=9), **said)[1:], pictures[1:]) > 10 * TOLERANCE
    encoder: Any = alpha.conditioner
    ids = encoder.tokenize(["A Red HEART"]).ids
    assert torch.equal(ids, encoder.tower.tokenize(["a red heart"]).ids)
    assert not torch.equal(ids, encoder.tower.tokenize(["A Red HEART"]).ids[:, : ids.shape[1]])
    lower = [prompt.lower() for prompt in PROMPTS]
    assert difference(ours(alpha, prompt=lower, **said), pictures) == 0


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "config",
    [
        {"sample_size": 128},
        {"sample_size": 64, "interpolation_scale": 2, "attention_bias": False, "norm_eps": 1e-3},
        {"use_additional_conditions": True, "upcast_attention": True},
        {"caption_channels": None, "cross_attention_dim": 16, "out_channels": None},
        {"patch_size": 1},
        {"interpolation_scale": 0.5},
    ],
)
def test_the_transformer_is_that_of_diffusers(config: dict[str, Any], backend: Attention) -> None:
    """Bit for bit, at its own size, others and others' shapes, with a mask and without."""
    shape: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    shape |= {"cross_attention_dim": 24, "caption_channels": 16, "sample_size": 8}
    with torch.random.fork_rng([]):
        theirs = draw_weights(PixArtTransformer2DModel(**shape | config), 0)
    told = json.loads(theirs.to_json_string())
    assert PixArtTransformer.odd(told) is None
    own = PixArtTransformer(told).eval()
    own.load_state_dict(theirs.state_dict())
    assert own.config == {key: value for key, value in told.items() if key[0] != "_"}
    for model in (theirs, own):
        set_attention(model, backend)
    random = torch.Generator().manual_seed(0)
    for count, size in ((1, (8, 8)), (3, (12, 6))):
        x = torch.randn(count, 4, *size, generator=random)
        states, t = torch.randn(count, 7, 16, generator=random), torch.linspace(9, 950, count)
        mask = torch.rand(count, 7, generator=random) > 0.4
        mask[:, 0] = True
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if own.told_sizes:
            sizes["resolution"] = 100 * torch.rand(count, 2, generator=random)
            sizes["aspect_ratio"] = torch.rand(count, 1, generator=random)
        given: dict[str, Any] = {"encoder_hidden_states": states, "timestep": t}
        for seen in (None, mask):
            given |= {"encoder_attention_mask": seen, "added_cond_kwargs": sizes}
            assert torch.equal(own(x, **given), theirs(x, **given).sample)


@torch.no_grad()
def test_places_are_kept_where_they_are_added() -> None:
    """The second call on a device, here one without memory, takes nothing from the CPU."""

    class Watch(TorchDispatchMode):
        seen: set[str]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            flat = tree_leaves((args, kwargs))
            self.seen |= {one.device.type for one in flat if isinstance(one, Tensor)}
            return func(*args, **kwargs or {})

    network: Any = tiny_pixart().network.module
    network = copy.deepcopy(network).to("meta")
    x, states = torch.empty(1, 4, 6, 4, device="meta"), torch.empty(1, 5, 16, device="meta")
    for devices in ({"cpu", "meta"}, {"meta"}):
        with (watch := Watch()):
            watch.seen = set()
            network(x, states, torch.empty(1, device="meta"))
        assert watch.seen == devices


def test_gradients_are_those_of_diffusers() -> None:
    """Within rounding, with and without checkpoints."""
    own: Any = tiny_pixart(sizes=True).network.module.requires_grad_(True)
    with torch.random.fork_rng([]):
        theirs = PixArtTransformer2DModel(**own.config)
    theirs.load_state_dict(own.state_dict())
    sizes = {"resolution": torch.full((2, 2), 16.0), "aspect_ratio": torch.ones(2, 1)}
    given: dict[str, Any] = {"timestep": torch.tensor([3.0, 700]), "added_cond_kwargs": sizes}
    given["encoder_hidden_states"] = torch.randn(2, 5, 16, generator=torch.Generator())
    theirs(noise(), **given).sample.square().mean().backward()
    other = dict(theirs.named_parameters())
    for checkpoints in (False, True):
        own.zero_grad()
        if checkpoints:
            own.enable_gradient_checkpointing()
        own(noise(), **given).square().mean().backward()
        for name, parameter in own.named_parameters():
            wanted: Any = other[name].grad
            assert (parameter.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


@torch.no_grad()
def test_sizes_of_a_call_and_ready_made_states(tmp_path: Path) -> None:
    """The original's size, the target's ratio of sides; in diffusers both are the picture's."""
    folder = tiny_pixart(sizes=True).save(tmp_path / "model")
    theirs, bundle = theirs_of(folder), Bundle.load(folder)
    text = TEXTS["negative"]
    told: dict[str, Any] = {"original_size": (512, 384), "target_size": (640, 768)}
    whole = theirs.transformer.forward

    def resized(*given: Any, added_cond_kwargs: Any, **more: Any) -> Any:
        sizes = {"resolution": torch.tensor([[512.0, 384]] * 4)}
        sizes["aspect_ratio"] = torch.full((4, 1), 640 / 768)
        assert {n: v.shape for n, v in sizes.items()} == {
            n: v.shape for n, v in added_cond_kwargs.items()
        }
        return whole(*given, added_cond_kwargs=sizes, **more)

    theirs.transformer.forward = resized
    wanted = drawn_by(theirs, **text)
    assert difference(ours(bundle, **told, **text), wanted) <= TOLERANCE
    for left_out in told:
        some = {name: size for name, size in told.items() if name != left_out}
        assert difference(ours(bundle, **some, **text), wanted) > 10 * TOLERANCE
    states, mask, away, away_mask = theirs.encode_prompt(
        PROMPTS, negative_prompt=text["negative_prompt"]
    )
    ready: dict[str, Any] = {"prompt_embeds": Condition(states=states, mask=mask.bool())}
    ready["negative_prompt_embeds"] = Condition(states=away, mask=away_mask.bool())
    scale = {"guidance_scale": text["guidance_scale"]}
    assert difference(ours(bundle, **ready, **told, **scale), wanted) <= TOLERANCE
    for bad, line in (
        ({"crop": (0, 0)}, "crop: this model is not told it"),
        ({"aesthetic_score": 6.0}, "aesthetic_score: this model is not told it"),
    ):
        with pytest.raises(UserError, match=line):
            ours(bundle, **bad)
    with pytest.raises(UserError, match="original_size: this model is told its prompt alone"):
        ours(tiny_pixart(), original_size=(8, 8))
