"""A model of Stable Diffusion XL is as any other: every edit, guidance and way with words."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pag.pipeline_pag_sd_xl import StableDiffusionXLPAGPipeline
from PIL import Image
from tiny import WIDTH, WINDOW, tiny_xl, with_own_networks
from torch import Tensor
from torch.nn.functional import interpolate

from latentdiff import ILVR, PAG, Blend, LatentDiffusionPipeline, RePaint, SDEdit, UserError
from latentdiff.bundle import Bundle
from latentdiff.editing import Region
from latentdiff.models.text_encoders import PLAIN, PenultimateTower, encode_tokens
from latentdiff.pipeline import Request, interpolation
from latentdiff.pipeline.texts import Conditions, encoded, texts_of

SOLVERS = ("euler", "dpmpp-2m", "ddpm")
BUNDLE = with_own_networks(tiny_xl())


def picture(size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hole() -> Image.Image:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    return mask


def draw(bundle: Bundle = BUNDLE, prompt: Any = "a red heart", **call: Any) -> Tensor:
    call = {"num_inference_steps": 3, "seed": 2, "output_type": "pt", "progress": False, **call}
    images = LatentDiffusionPipeline(bundle)(prompt, **call).images
    assert bool(torch.isfinite(images).all())
    return images


def pixels() -> Tensor:
    return torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("solver", SOLVERS)
def test_constraints_hold(solver: str) -> None:
    plain = draw(solver=solver)
    assert plain.std() > 0.05
    for edit in (RePaint(picture(), hole(), resamples=2, jump_length=1), Blend(picture(), hole())):
        painted = draw(edits=[edit], solver=solver)
        assert (painted[..., 8:] - pixels()[..., 8:]).abs().max() < 1e-6
        assert (painted[..., :8] - pixels()[..., :8]).abs().max() > 0.05
    close = draw(edits=[SDEdit(picture(), 0.4)], solver=solver)
    assert (close - plain).abs().max() > 0.05
    assert (draw(edits=[SDEdit(picture(), 0)], solver=solver) - pixels()).abs().max() < 1e-6
    coarse = draw(edits=[ILVR(picture(), 4)], solver=solver)
    far, near = (
        interpolate(drawn - pixels(), scale_factor=1 / 4, mode="area").abs().mean()
        for drawn in (plain, coarse)
    )
    assert near < far  # the guide is held in latents, of an autoencoder that has learned nothing


@pytest.mark.parametrize(
    "call",
    [
        {"edits": ["pag:3"]},
        {"edits": ["seg:2"]},
        {"edits": ["threshold:0.9"]},
        {"guidance": "apg"},
        {"also": ["a hat:0.7"]},
        {"negative_prompt": "a blue square"},
        {"clip_skip": 1},
    ],
    ids=str,
)
def test_guidances_and_further_prompts_change_the_picture(call: dict[str, Any]) -> None:
    assert (draw(**call) - draw()).abs().max() > 1e-3


def test_a_region_of_a_large_picture_is_painted() -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (4, 4, 12, 12))
    region = Region.around(picture(32), mask, BUNDLE.size)
    edit = RePaint(region.image, region.mask)
    painted = region.paste(
        LatentDiffusionPipeline(BUNDLE)(
            "a red heart", edits=[edit], num_inference_steps=2, seed=0, progress=False
        ).images[0]
    )
    inside = np.array(mask)[..., None] > 0
    differs = np.array(painted) != np.array(picture(32))
    assert not (differs & ~inside).any()
    assert (differs & inside).any()


def test_several_prompts_are_drawn_as_each_alone() -> None:
    both = draw(prompt=["a red heart", "a blue square"], seed=[2, 5])
    alone = torch.cat([draw(), draw(prompt="a blue square", seed=5)])
    assert (both - alone).abs().max() < 1e-4


def test_weights_and_long_prompts_by_a_straight_computation() -> None:
    """States of each encoder by itself; the pooled vector has no weights, and is of the first
    chunk."""
    conditioner, size = BUNDLE.conditioner, (16, 16)
    weighed = replace(PLAIN, weights="comfyui")
    got = conditioner.encode(["a (red:1.5) heart"], size, weighed).condition
    plain = conditioner.encode(["a red heart"], size).condition
    assert got.states is not None
    assert plain.states is not None
    assert torch.allclose(got.pooled, plain.pooled, atol=1e-6)  # pyright: ignore
    towers: Any = conditioner.towers
    expected: list[Tensor] = []
    for tower in towers.values():
        states = tower.encode(["a red heart", ""]).states
        words = [token for token, _ in encode_tokens(tower.tokenizer, "a red heart")]
        red = [token for token, _ in encode_tokens(tower.tokenizer, "red")][1:-1]
        first = next(n for n in range(len(words)) if words[n : n + len(red)] == red)
        weights = torch.ones(WINDOW)
        weights[first : first + len(red)] = 1.5
        expected.append(states[1] + weights[:, None] * (states[0] - states[1]))
    assert torch.allclose(got.states[0], torch.cat(expected, -1), atol=1e-5)

    long = "a red heart BREAK a blue square"
    got = conditioner.encode([long], size, replace(PLAIN, long=True)).condition
    chunks = conditioner.encode(["a red heart", "a blue square"], size).condition
    together = chunks.states.flatten(0, 1)[None]  # pyright: ignore
    assert torch.allclose(got.states, together, atol=1e-5)  # pyright: ignore
    assert torch.allclose(got.pooled, chunks.pooled[:1], atol=1e-5)  # pyright: ignore
    assert (draw(prompt=long, long_prompts=True) - draw()).abs().max() > 1e-3


def test_the_pooled_vector_stands_at_the_end_of_the_text() -> None:
    """Of the text, and not of the padding."""
    tower = tiny_xl().conditioner.towers["text_encoder_2"]
    assert isinstance(tower, PenultimateTower)
    tokens = tower.tokenize(["a red heart", "a red"])
    text = tower.states(tokens)
    last = tower.model(input_ids=tokens.ids).last_hidden_state
    ends = [len(encode_tokens(tower.tokenizer, words)) - 1 for words in ("a red heart", "a red")]
    model: Any = tower.model
    wanted = model.text_projection(last[torch.arange(2), ends])
    assert torch.allclose(text.pooled, wanted, atol=1e-6)  # pyright: ignore


def test_the_way_between_prompts() -> None:
    pipe = LatentDiffusionPipeline(BUNDLE)
    way = interpolation.between_prompts(
        pipe, "a red heart", "a blue square", [0.0, 0.5, 1.0], num_inference_steps=3, seed=2
    )
    assert (way[:1] - draw()).abs().max() < 1e-4
    assert (way[1] - way[0]).abs().max() > 1e-3
    assert BUNDLE.conditioner.width > WIDTH


@pytest.mark.parametrize("applied", ["mid"])
def test_pag_draws_what_diffusers_draws(applied: str, tmp_path: Any) -> None:
    folder = tiny_xl().save(tmp_path / "model")
    theirs: Any = StableDiffusionXLPAGPipeline.from_pretrained(folder, pag_applied_layers=[applied])
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    call: dict[str, Any] = {"latents": noise, "guidance_scale": 4.0, "num_inference_steps": 8}
    wanted = theirs("a red heart", pag_scale=3.0, output_type="pt", **call).images
    bundle = Bundle.load(folder)
    got = draw(bundle, edits=[PAG(3.0, layers=("mid_block",))], **call)
    assert (got - wanted).abs().max() <= 1e-4
    assert (got - draw(bundle, **call)).abs().max() > 1e-3


@pytest.mark.parametrize("refiner", [False, True])
def test_sizes_of_a_ready_made_prompt_are_those_of_all_branches(refiner: bool) -> None:
    """A refiner is told another score of what is not wanted all the same."""
    bundle = tiny_xl(refiner=refiner)
    size = (16, 16)
    ready = bundle.conditioner.encode(["a red heart"], size).condition
    row = [512.0, 384.0, 64.0, 32.0, *([7.5] if refiner else [640.0, 768.0])]
    request = Request(
        prompt_embeds=replace(ready, sizes=torch.tensor([row])), negative_prompt="x", also=["a hat"]
    )
    context = LatentDiffusionPipeline(bundle).prepare(Request(prompt="a")).context

    def told(request: Request) -> Conditions:
        return encoded(bundle, request, texts_of(request), context, guided=True, moves=2)

    got = told(request)
    away = [*row[:4], 2.5] if refiner else row
    for condition, wanted in (
        (got.positive[0], row),
        (got.further[0][0], row),
        (got.negative[0], away),
        (told(replace(request, negative_prompt=None)).negative[0], away),
    ):
        assert condition.sizes is not None
        assert condition.sizes.tolist() == [wanted]
    own = replace(ready, sizes=torch.tensor([row]) + 1)
    kept = told(replace(request, negative_prompt=None, negative_prompt_embeds=own)).negative[0]
    assert torch.equal(kept.sizes, own.sizes)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"its sizes must be \[1, \d\] finite numbers"):
        told(replace(request, prompt_embeds=replace(ready, sizes=torch.ones(1, 4))))
