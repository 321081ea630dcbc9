"""The pipeline: one noise stream for each picture, nothing shared, nothing begun on bad input."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, unet_of, vae_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, PipelineOutput, SDEdit, UserError
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.solvers import DDIM, DDPM, Heun

CLIP = LatentDiffusionPipeline(tiny_bundle())
T5 = LatentDiffusionPipeline(tiny_bundle(tower="t5"))


def draw(prompt: Any, pipe: LatentDiffusionPipeline = CLIP, **changed: Any) -> PipelineOutput:
    arguments = {"num_inference_steps": 4, "output_type": "pt", "progress": False} | changed
    return pipe(prompt, **arguments)


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.mark.parametrize("solver", ["dpmpp-2m", "ddpm"])
def test_a_picture_is_the_same_in_every_batch_and_order(solver: str) -> None:
    whole = draw("a red heart", num_images_per_prompt=8, seed=7, solver=solver)
    assert whole.seeds == [7] * 8
    assert whole.indices == list(range(8))
    for index in (0, 5):
        alone = draw("a red heart", seed=7, first=index, solver=solver)
        assert distance(alone.images[0], whole.images[index]) <= 1e-4
    pair = draw("a red heart", num_images_per_prompt=2, seed=7, first=3, solver=solver)
    assert distance(pair.images, whole.images[3:5]) <= 1e-4
    assert distance(whole.images[0], whole.images[1]) > 0.05

    seeds = [11, 3, 8]
    shuffled = draw(["a red heart"] * 3, seed=seeds, solver=solver)
    for place, seed in enumerate(seeds):
        alone = draw("a red heart", seed=seed, solver=solver)
        assert distance(alone.images[0], shuffled.images[place]) <= 1e-4


def test_prompts_of_a_batch_do_not_touch_each_other() -> None:
    prompts = ["a red heart", "the face of a sad dog", "a cat"]
    for pipe in (CLIP, T5):  # T5 pads to the longest: the padding must not be seen
        whole = draw(prompts, pipe, seed=[1, 2, 3], negative_prompt=["", "a dog", "a blue square"])
        alone = draw(prompts[2], pipe, seed=3, negative_prompt="a blue square")
        assert distance(whole.images[2], alone.images[0]) <= 1e-4
        other = draw(prompts[0], pipe, seed=3, negative_prompt="a blue square")
        assert distance(other.images, alone.images) > 1e-3


def test_pictures_follow_their_prompts() -> None:
    several = draw(["a red heart", "a cat"], num_images_per_prompt=2, seed=1)
    cats = draw("a cat", num_images_per_prompt=2, seed=1, first=2)
    assert distance(several.images[2:], cats.images) <= 1e-4


def test_two_threads_share_a_pipeline() -> None:
    prompts = ["a red heart", "a green heart with an arrow", "a cat", "a slice of pizza"] * 2
    alone = [draw(p, T5, seed=k).images for k, p in enumerate(prompts)]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda job: draw(job[1], T5, seed=job[0]).images, enumerate(prompts))
        for one, other in zip(alone, together, strict=True):
            assert distance(one, other) <= 1e-5


def test_the_conditions_are_one_batch_and_scale_one_is_off() -> None:
    sizes: list[int] = []
    hook = unet_of(CLIP.bundle).register_forward_pre_hook(
        lambda _, inputs: sizes.append(len(inputs[0]))
    )
    try:
        guided = draw("a cat", num_images_per_prompt=3, seed=0, negative_prompt="a dog")
        assert sizes == [6] * 4
        assert guided.nfe == 4
        sizes.clear()
        off = draw("a cat", num_images_per_prompt=3, seed=0, guidance_scale=1)
        assert sizes == [3] * 4
    finally:
        hook.remove()
    ignored = draw("a cat", num_images_per_prompt=3, seed=0, guidance_scale=1, negative_prompt="x")
    assert distance(off.images, ignored.images) == 0
    assert distance(off.images, guided.images) > 1e-3


def test_guidance_arguments_arrive() -> None:
    plain, off = draw("a cat", seed=0), draw("a cat", seed=0, guidance_scale=1)
    assert distance(draw("a cat", seed=0, guidance_rescale=1.0).images, plain.images) > 1e-3
    never = draw("a cat", seed=0, guidance_interval=(1e6, 1e7))
    assert distance(never.images, off.images) <= 1e-5
    assert distance(draw("a cat", seed=0, timetable="karras").images, plain.images) > 1e-3
    named, built = (draw("a cat", seed=0, solver=s).images for s in ("euler-a", DDIM(eta=1.0)))
    assert distance(named, built) == 0


def told(v: float) -> LatentDiffusionPipeline:
    """The same model with a head that says v of every variance."""
    own = unet_of(CLIP.bundle).state_dict()
    unet = unet_of(tiny_bundle(learned_variance=True))
    for name, value in unet.state_dict().items():
        value.fill_(0.0 if name.endswith("weight") else v)
        value[: len(own[name])] = own[name]
    return LatentDiffusionPipeline(
        dataclasses.replace(CLIP.bundle, network=CLIP.bundle.network.with_module(unet))
    )


def test_ddpm_takes_the_networks_variance_and_nothing_else_does() -> None:
    """-1 is the posterior's and 1 the kernel's, under guidance and through an edit as well."""
    fixed: dict[float, DDPM] = {-1.0: DDPM("fixed-small"), 1.0: DDPM("fixed-large")}
    variations: dict[float, list[dict[str, Any]]] = {
        -1.0: [{}, {"guidance_scale": 1}],
        1.0: [{"guidance": "apg"}, {"edits": [Halved()]}],
    }
    pipe = CLIP
    for v, same in fixed.items():
        pipe = told(v)
        for more in variations[v]:
            with_v = draw("a cat", pipe, seed=3, solver="ddpm", **more)
            assert distance(with_v.images, draw("a cat", seed=3, solver=same, **more).images) < 1e-4
    assert distance(draw("a cat", pipe, seed=3).images, draw("a cat", seed=3).images) < 1e-5
    small, large = (draw("a cat", seed=3, solver=solver).images for solver in fixed.values())
    assert distance(small, large) > 1e-2


class Halved:
    """An edit of the estimate."""

    def denoiser(self, denoise: Any) -> Any:
        def halved(x: Tensor, level: NoiseLevel) -> Any:
            estimate = denoise(x, level)
            return estimate.with_x0(0.5 * estimate.x0)

        return halved


def test_the_models_own_solver_is_taken_unless_another_is_named() -> None:
    own = LatentDiffusionPipeline(dataclasses.replace(CLIP.bundle, solver="euler-a"))
    named = draw("a cat", seed=0, solver="euler-a").images
    assert distance(draw("a cat", own, seed=0).images, named) == 0
    default = draw("a cat", seed=0).images
    assert distance(draw("a cat", own, seed=0, solver="dpmpp-2m").images, default) == 0
    assert distance(named, default) > 1e-3


def test_seeds() -> None:
    one, other = draw("a cat"), draw("a cat")
    assert one.seeds != other.seeds
    assert distance(draw("a cat", seed=one.seeds[0]).images, one.images) == 0
    generator = torch.Generator().manual_seed(3)
    first, second = draw("a cat", generator=generator), draw("a cat", generator=generator)
    assert first.seeds != second.seeds
    again = draw("a cat", generator=torch.Generator().manual_seed(3))
    assert distance(again.images, first.images) == 0


def test_the_global_generators_are_left_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    draw("a cat", solver="ddpm")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state()) == repr(numpy_state)  # noqa: NPY002


def test_output_types_agree() -> None:
    tensor = draw("a cat", seed=2, height=12, width=20)
    assert tensor.images.shape == (1, 3, 12, 20)
    array = draw("a cat", seed=2, height=12, width=20, output_type="np").images
    assert np.array_equal(array, tensor.images.permute(0, 2, 3, 1).numpy())
    [image] = draw("a cat", seed=2, height=12, width=20, output_type="pil").images
    assert isinstance(image, Image.Image)
    assert np.abs(np.asarray(image) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    latents = draw("a cat", seed=2, height=12, width=20, output_type="latent")
    assert torch.equal(latents.images, tensor.latents)
    assert latents.images.shape == (1, 4, 6, 10)


def test_given_latents_are_the_first_noise() -> None:
    noise = NoiseStreams(5).draw((4, 8, 8))
    assert distance(draw("a cat", latents=noise, seed=9).images, draw("a cat", seed=5).images) == 0


def test_the_callback_sees_and_replaces() -> None:
    seen: list[tuple[int, float]] = []

    def callback(index: int, level: NoiseLevel, x: Tensor) -> Tensor | None:
        seen.append((index, level.sigma))
        return torch.ones_like(x) if index == 3 else None

    output = draw("a cat", on_move=callback)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert seen[-1][1] == 0
    assert bool((output.latents == 1).all())


class Hold:
    """An edit that puts the left half back to a constant after each step."""

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        held = x.clone()
        held[..., : x.shape[-1] // 2] = 0.25
        return held


class Late:
    """An edit that drops the first two levels."""

    def timetable(self, timetable: Any) -> Any:
        return timetable[2:]


def test_edits_reach_the_run() -> None:
    output = draw("a cat", edits=[Hold(), Late()])
    assert bool((output.latents[..., :4] == 0.25).all())
    assert output.nfe == 2


@pytest.mark.parametrize(
    ("size", "told"), [((16, 16), None), ((16, 18), "1.1 times"), ((32, 64), "8.0 times")]
)
def test_a_picture_larger_than_the_models_own_is_told(
    size: tuple[int, int], told: str | None
) -> None:
    height, width = size
    picture = Image.new("RGB", (width, height))
    asked: list[dict[str, Any]]
    asked = [{"height": height, "width": width}, {"edits": [SDEdit(picture, 0.5)]}]
    for arguments in asked:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            draw("a cat", **arguments)
        messages = [str(warning.message) for warning in said]
        assert len(messages) == (told is not None)
        assert all(f"{width} x {height} pixels are {told}" in message for message in messages)


def test_a_long_prompt_is_reported() -> None:
    prompt = "a red heart and the face of a sad dog, flat style, with pizza"
    with pytest.warns(UserWarning, match="longer than the model's window of 12 tokens") as caught:
        output = draw([prompt, "a cat"], num_images_per_prompt=2)
    assert len(caught) == 1
    assert output.cut[0] == output.cut[1]
    assert prompt.endswith(output.cut[0])
    assert output.cut[0] in str(caught[0].message)
    assert output.cut[2:] == ["", ""]


def test_cfg_plus_plus_warns_of_solvers_that_draw_noise() -> None:
    half: dict[str, Any] = {"guidance": "cfg++", "guidance_scale": 0.5}
    with pytest.warns(UserWarning, match="up to twice as much") as caught:
        draw("a cat", solver="euler-a", **half)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw("a cat", solver="ddim", **half)
        draw("a cat", solver="euler-a")
        draw("a cat", solver="euler-a", guidance="cfg++", guidance_scale=1.0)


def test_a_method_has_a_scale_of_its_own() -> None:
    """CFG++ takes 0 .. 1, so the 4 of the others is no default for it."""
    for guidance, scale in (("cfg++", 0.6), ("cfg", 4.0), ("apg", 4.0)):
        own, told = (
            draw("a cat", seed=7, solver="ddim", guidance=guidance, guidance_scale=given)
            for given in (None, scale)
        )
        assert torch.equal(own.images, told.images)


def test_names_of_other_tools_say_solver_and_timetable() -> None:
    plain = draw("a cat", seed=7).images
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"solver": "DPM++ 2M Karras"}, {"solver": "dpmpp-2m", "timetable": "karras"}),
        ({"solver": "euler_a"}, {"solver": "euler-a"}),
        ({"solver": "heun", "timetable": "Normal"}, {"timetable": "linspace"}),
    ]
    for named, ours in cases:
        theirs = draw("a cat", seed=7, **named).images
        assert torch.equal(theirs, draw("a cat", seed=7, **(named | ours)).images)
        assert not torch.equal(theirs, plain)
    assert torch.equal(draw("a cat", seed=7, timetable="Automatic").images, plain)


BAD: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": "  \n"},
    {"prompt": []},
    {"prompt": ["a cat", ""]},
    {"prompt": [3]},
    {"prompt": None},
    {"prompt": "x" * 10_001},
    {"prompt": "\ud83d"},
    {"negative_prompt": "x" * 10_001},
    {"negative_prompt": ["a", "b"]},
    {"also": "a hat"},
    {"also": None},
    {"also": [""]},
    {"also": [("a hat", math.nan)]},
    {"also": [("a hat", "x")]},
    {"also": [("a hat", 1.0, 2.0)]},
    {"prompt": "(:1.3)", "prompt_weights": True},
    {"prompt": "(cat:11)", "prompt_weights": True},
    {"prompt": "(" * 500 + "cat", "prompt_weights": True},
    {"num_inference_steps": 0},
    {"num_inference_steps": 1001},
    {"num_inference_steps": 2.5},
    {"num_inference_steps": True},
    {"height": 15},
    {"height": 0},
    {"width": -16},
    {"width": 10**9},
    {"num_images_per_prompt": 0},
    {"num_images_per_prompt": 10**8},
    {"solver": "dpm++2m"},
    {"timetable": "karas"},
    {"timetable": []},
    {"timetable": [1.0, 0.0]},
    {"guidance_scale": math.nan},
    {"guidance_scale": math.inf},
    {"guidance_scale": "4"},
    {"guidance_rescale": 2.0},
    {"guidance_rescale": None},
    {"guidance_interval": (3.0, 1.0)},
    {"guidance_interval": None},
    {"guidance": "cfg++", "guidance_scale": 4.0},
    {"guidance": 3},
    {"solver": 3},
    {"solver": Heun},
    {"seed": -2},
    {"solver": "DPM++ 2M Karras", "timetable": "exponential"},
    {"solver": "DPM++ 2M Karas"},
    {"seed": 1.5},
    {"seed": [1, 2]},
    {"first": -1},
    {"seed": 1, "generator": torch.Generator()},
    {"generator": [torch.Generator()]},
    {"latents": torch.zeros(1, 4, 8, 7)},
    {"latents": torch.full((1, 4, 8, 8), math.nan)},
    {"latents": np.zeros((1, 4, 8, 8))},
    {"output_type": "jpeg"},
    {"output_type": 3},
    {"edits": [object()]},
    {"edits": SDEdit(Image.new("RGB", (16, 16)), 0.6)},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: "-".join(bad))
def test_bad_input_is_one_line_before_any_drawing(bad: dict[str, Any]) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was called")

    hook = unet_of(CLIP.bundle).register_forward_pre_hook(refuse)
    try:
        with pytest.raises(UserError) as caught:
            draw(bad.get("prompt", "a cat"), **{k: v for k, v in bad.items() if k != "prompt"})
    finally:
        hook.remove()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"solver": "dpmpp2m"}, "did you mean 'dpmpp-2m'"),
        ({"timetable": "karas"}, "did you mean 'karras'"),
        ({"edits": "pag:3"}, r"edits: give a list, as \[SDEdit\(picture, 0.6\), 'pag:3'\]"),
    ],
)
def test_a_near_miss_gets_a_hint(wrong: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        draw("a cat", **wrong)


def test_many_pictures_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode: Callable[..., Any] = vae_of(CLIP.bundle).decode

    def watched(z: Tensor, **options: Any) -> Any:
        decoded.append(len(z))
        return decode(z, **options)

    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = CLIP.bundle.autoencoder.decode(latents)
    monkeypatch.setattr("latentdiff.models.autoencoder._DECODED_AT_ONCE", 2 * 16 * 16)
    monkeypatch.setattr(vae_of(CLIP.bundle), "decode", watched)
    assert distance(CLIP.bundle.autoencoder.decode(latents), whole) <= 1e-5
    assert decoded == [2, 2, 1]
