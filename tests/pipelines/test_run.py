"""A prepared run: stepped it draws what the call draws; it is watched, changed and cancelled."""

import dataclasses
import inspect
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, unet_of, vae_of
from torch import Tensor, nn

from latentdiff import Blend, Bundle, LatentDiffusionPipeline, RePaint, SDEdit, UserError
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import RunContext
from latentdiff.guidance import DynamicThresholding
from latentdiff.pictures import to_tensor
from latentdiff.pipeline import Request, Run

PIPE = LatentDiffusionPipeline(tiny_bundle())


def picture(width: int = 13, height: int = 15) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def hole(width: int = 13, height: int = 15) -> Image.Image:
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def asked(**changed: Any) -> dict[str, Any]:
    return {"prompt": "a red heart", "num_inference_steps": 4, "seed": 7} | changed


def prepared(**changed: Any) -> Run:
    return PIPE.prepare(Request(**asked(**changed)))


@contextmanager
def calls_of(network: nn.Module) -> Iterator[list[int]]:
    """The number of rows of each call of a network."""
    calls: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    try:
        yield calls
    finally:
        hook.remove()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "noisy": {"solver": "dpmpp-2m-sde", "num_images_per_prompt": 3},
    "two calls a step": {"solver": "heun", "prompt": ["a red heart", "a sad dog"]},
    "adaptive": {"solver": "dpm-adaptive", "num_inference_steps": 2},
    "edits": {
        "solver": "ddpm",
        "edits": [
            SDEdit(picture(), 0.7),
            RePaint(picture(), hole(), jump_length=1, resamples=2),
            "pag:2",
            "threshold:0.9",
        ],
    },
    "guided": {"guidance": "apg", "also": ["a dog:0.5"], "guidance_interval": (0.5, 3.0)},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "adaptive" else []) for n in CASES],
)
def test_stepped_is_called_to_the_last_bit(name: str) -> None:
    called = PIPE(**asked(**CASES[name]), output_type="pt", progress=False)
    run = prepared(**CASES[name])
    moves = list(run.steps())
    stepped, again = run.finish("pt"), run.finish("pt")
    finished = prepared(**CASES[name]).finish("pt")  # the steps that are left: all of them
    drawn = PIPE.draw(Request(**asked(**CASES[name])), output_type="pt", progress=False)
    for output in (stepped, again, finished, drawn):
        assert torch.equal(output.images, called.images)
        assert torch.equal(output.latents, called.latents)
        assert (output.seeds, output.indices) == (called.seeds, called.indices)
        assert (output.nfe, output.cut) == (called.nfe, called.cut)
    assert [move.index for move in moves] == list(range(len(run)))
    assert [move.level for move in moves] == list(run.levels[1:])
    assert torch.equal(moves[-1].x, called.latents)
    assert not moves[-1].x.requires_grad


def test_preparing_draws_nothing_and_a_step_makes_its_own_calls_only() -> None:
    with calls_of(unet_of(PIPE.bundle)) as calls, calls_of(vae_of(PIPE.bundle)) as decoded:
        run = prepared(solver="heun")
        assert (calls, run.x0) == ([], None)
        steps = run.steps()
        assert calls == []
        next(steps)
        assert calls == [2, 2]
        next(steps)
        assert calls == [2] * 4
        assert decoded == []
    assert run.network.calls == 4


def test_steps_of_two_runs_in_turns_and_in_threads() -> None:
    requests = [asked(solver="dpmpp-3m-sde", seed=seed, guidance="apg") for seed in (1, 2)]
    alone = [PIPE(**each, output_type="latent", progress=False).images for each in requests]
    one, other = (PIPE.prepare(Request(**each)) for each in requests)
    for _ in zip(one.steps(), other.steps(), strict=True):
        pass
    for run, expected in zip((one, other), alone, strict=True):
        assert torch.equal(run.latents, expected)
    runs = [PIPE.prepare(Request(**requests[k % 2])) for k in range(8)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda run: run.finish("latent").images, runs))
    for place, latents in enumerate(outputs):
        assert torch.equal(latents, alone[place % 2])


def test_a_request_has_the_arguments_of_a_call_and_their_defaults() -> None:
    call = dict(inspect.signature(LatentDiffusionPipeline.__call__).parameters)
    own = set(inspect.signature(LatentDiffusionPipeline.draw).parameters) | {"return_dict"}
    defaults = {name: p.default for name, p in call.items() if name not in own}
    defaults["num_inference_steps"] = Bundle.num_inference_steps  # of a call the model's own
    assert defaults == {field.name: field.default for field in dataclasses.fields(Request)}


class Cancels:
    """An edit that cancels the run, as another thread might, in the middle of a step."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.steps = 0

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        self.steps += 1
        if self.run is not None and self.steps == 2:
            thread = threading.Thread(target=self.run.cancel)
            thread.start()
            thread.join()
        return x


def test_a_cancelled_run_ends_before_its_next_step_and_shows_what_it_had() -> None:
    edit = Cancels()
    whole = PIPE(**asked(edits=[edit]), output_type="pt", progress=False)
    assert edit.steps == 4
    edit = Cancels()
    run = edit.run = prepared(edits=[edit])
    moves = list(run.steps())
    assert (len(moves), run.network.calls, edit.steps) == (2, 2, 2)
    with pytest.raises(UserError, match="was cancelled"):
        run.finish()
    shown = run.preview("pt")
    assert isinstance(shown, Tensor)
    assert shown.shape == whole.images.shape
    assert run.x0 is not None
    decoded = PIPE.bundle.autoencoder.decode(run.x0) / 2 + 0.5
    torch.testing.assert_close(shown, decoded.clamp(0, 1))
    early = prepared()
    early.cancel()
    with calls_of(unet_of(PIPE.bundle)) as calls, pytest.raises(UserError, match="was cancelled"):
        early.finish()
    assert calls == []


def test_a_run_that_was_left_has_no_picture_and_is_stepped_once() -> None:
    run = prepared()
    steps = run.steps()
    next(steps)
    with pytest.raises(UserError, match="left before its last step"):
        run.finish()
    with pytest.raises(UserError, match="prepare another"):
        next(run.steps())
    list(steps)
    called = PIPE(**asked(), output_type="pt", progress=False)
    assert torch.equal(run.finish("pt").images, called.images)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_replaced_latents_are_stepped_on_from_as_those_of_a_callback(place: int) -> None:
    def replace(index: int, level: NoiseLevel, x: Tensor) -> Tensor | None:
        return x.flip(-1) if index == place else None

    settings = asked(solver="dpmpp-2m")
    called = PIPE(**settings, output_type="pt", on_move=replace, progress=False)
    run = PIPE.prepare(Request(**settings))
    for move in run.steps():
        assert run.latents is move.x
        if move.index == place:
            run.latents = move.x.flip(-1)
    assert torch.equal(run.finish("pt").images, called.images)
    untouched = PIPE(**settings, output_type="pt", progress=False)
    assert not torch.equal(called.images, untouched.images)


def test_latents_put_there_before_the_first_step_are_begun_with() -> None:
    run, other = prepared(), prepared(seed=8)
    run.latents = other.latents.clone()
    assert torch.equal(run.finish("latent").images, other.finish("latent").images)


@pytest.mark.parametrize("edits", [[], ["pag:2", DynamicThresholding(0.8, 0.5)]])
def test_x0_is_the_last_estimate_edits_and_guidance_included(edits: list[Any]) -> None:
    """DDIM tells it: x' = (sigma' / sigma) x + (alpha' - alpha sigma' / sigma) x_0."""
    run = prepared(solver="ddim", edits=edits, num_images_per_prompt=2)
    x, here = run.latents, run.levels[0]
    for move in run.steps():
        there, keep = move.level, move.level.sigma / here.sigma
        assert run.x0 is not None
        moved = keep * x + (there.alpha - keep * here.alpha) * run.x0
        torch.testing.assert_close(moved, move.x, atol=1e-5, rtol=1e-5)
        if edits:
            assert run.x0.abs().max() <= 0.5 + 1e-6
        x, here = move.x, there
    assert run.x0 is not None
    torch.testing.assert_close(run.latents, run.x0)


def test_a_preview_is_the_noise_and_then_the_estimate_in_every_type() -> None:
    run = prepared(num_images_per_prompt=2)
    assert torch.equal(torch.as_tensor(run.preview("latent")), run.latents)
    next(run.steps())
    assert run.x0 is not None
    assert torch.equal(torch.as_tensor(run.preview("latent")), run.x0)
    unit, array, pictures = run.preview("pt"), run.preview("np"), run.preview("pil")
    assert isinstance(unit, Tensor)
    assert isinstance(array, np.ndarray)
    assert isinstance(pictures, list)
    expected = (PIPE.bundle.autoencoder.decode(run.x0) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(unit, expected)
    assert np.array_equal(array, unit.permute(0, 2, 3, 1).numpy())
    for image, values in zip(pictures, array, strict=True):
        assert np.abs(np.asarray(image) / 255 - values).max() <= 0.5 / 255 + 1e-6


def test_a_preview_of_an_edit_has_its_size_and_its_known_pixels() -> None:
    """As the picture will have; and it changes nothing of the run."""
    settings = asked(edits=[Blend(picture(), hole())])
    run = PIPE.prepare(Request(**settings))
    known = torch.from_numpy(np.array(hole())) == 0
    given = to_tensor(picture()) / 2 + 0.5
    for _ in run.steps():
        shown = run.preview("pt")
        assert isinstance(shown, Tensor)
        assert shown.shape == (1, 3, 15, 13)
        assert torch.equal(shown[0][:, known], given[:, known])
    called = PIPE(**settings, output_type="pt", progress=False)
    assert torch.equal(run.finish("pt").images, called.images)


class Counted:
    """An edit with every touch point outside the network; it notes its calls in their order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def bind(self, context: RunContext) -> tuple["Counted", Any]:
        self.calls.append("bind")
        assert context.prompts == ["a red heart"] * 2

        def finish(pictures: Tensor) -> Tensor:
            self.calls.append("finish")
            return pictures

        return self, finish

    def timetable(self, timetable: Timetable) -> Timetable:
        self.calls.append("timetable")
        return timetable[2:]

    def begin(self, x: Tensor, timetable: Timetable, noise: NoiseStreams) -> Tensor:
        self.calls.append("begin")
        assert len(timetable) == 3  # the levels of the run, as the edits have changed them
        return x

    def denoiser(self, denoise: Any) -> Any:
        self.calls.append("denoiser")
        return denoise

    def after(self, x: Tensor, level: NoiseLevel, noise: NoiseStreams) -> Tensor:
        self.calls.append("after")
        return x


def test_every_touch_point_is_asked_once_a_call_and_in_this_order() -> None:
    expected = ["bind", "timetable", "begin", "denoiser", "after", "after", "finish"]
    edit = Counted()
    output = PIPE(**asked(num_images_per_prompt=2, edits=[edit]), progress=False)
    assert edit.calls == expected
    assert output.nfe == 2
    edit.calls.clear()
    run = prepared(num_images_per_prompt=2, edits=[edit])
    assert edit.calls == expected[:2]
    assert len(run) == 2
    list(run.steps())
    assert edit.calls == expected[:-1]


def test_a_run_of_no_moves_is_its_beginning() -> None:
    run = prepared(edits=[SDEdit(picture(), 0.0)])
    assert len(run) == 0
    assert list(run.steps()) == []
    output = run.finish("pt")
    assert output.nfe == 0
    assert torch.equal(output.images[0], to_tensor(picture()) / 2 + 0.5)


def test_the_warning_of_cfg_plus_plus_comes_before_anything_is_drawn() -> None:
    """So that a caller who makes errors of warnings pays for no step."""
    settings = asked(guidance="cfg++", guidance_scale=0.5, solver="euler-a")
    with calls_of(unet_of(PIPE.bundle)) as calls, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="up to twice as much"):
            PIPE(**settings, progress=False)
        with pytest.raises(UserWarning, match="up to twice as much"):
            PIPE.prepare(Request(**settings))
    assert calls == []
    quiet_ones: list[dict[str, Any]] = [
        {"solver": "ddim"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
    ]
    for quiet in quiet_ones:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PIPE.prepare(Request(**settings | quiet))
