"""Controls with every edit, solver, guidance and engine; control pictures."""

import time
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from every_edit import EDITS, SIZE, SOLVERS, hole, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from tiny import tiny_bundle, tiny_control, with_own_networks

from latentdiff import Control, LatentDiffusionPipeline, Request, UserError
from latentdiff.bundle import Bundle
from latentdiff.editing.control_pictures import _hysteresis, control_picture, edges, names
from latentdiff.editing.lowpass import low_pass
from latentdiff.models.control import ControlNetwork
from latentdiff.models.controlnet import ControlNet
from latentdiff.models.engines import PackedNetwork
from latentdiff.pictures import to_tensor


@cache
def model() -> Bundle:
    return with_own_networks(tiny_bundle())


@cache
def network(seed: int = 10) -> ControlNetwork:
    theirs: Any = tiny_control(seed=seed)
    module = ControlNet(dict(theirs.config))
    module.load_state_dict(theirs.state_dict())
    return ControlNetwork(module.eval().requires_grad_(False))


def draw(*edits: Any, bundle: Bundle | None = None, **call: Any) -> Any:
    given = {"num_inference_steps": 3, "seed": 5, "output_type": "pt", "progress": False}
    if not edits and "controls" not in call:
        given |= {"height": 16, "width": 16}
    pipe = LatentDiffusionPipeline(bundle or model())
    return pipe("a red heart", edits=edits, **given | call)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_control_with_every_edit_and_solver(edit: str, solver: str) -> None:
    """The control is seen; known pixels stay bit for bit, and the reference's low frequencies."""
    control = Control(network(), picture(1))
    size: dict[str, Any] = {} if EDITS[edit] else {"height": 14, "width": 16}
    plain = draw(*EDITS[edit], solver=solver, **size)
    output = draw(*EDITS[edit], solver=solver, controls=[control])
    images = output.images
    assert images.shape == (1, 3, *SIZE[::-1])
    assert bool(torch.isfinite(images).all())
    height, width = images.shape[-2:]
    assert (images - plain.images[..., :height, :width]).abs().max() > 0.01
    given = to_tensor(picture(0))
    if edit in ("SDEdit", "RePaint"):
        known = torch.from_numpy(np.asarray(hole()) == 0)
        assert torch.equal(images[0][:, known], (given / 2 + 0.5)[:, known])
    if edit == "ILVR":
        padded = torch.nn.functional.pad(given[None], (0, 1, 0, 1), mode="replicate")
        with torch.no_grad():
            reference = model().autoencoder.encode(padded)
        gap = low_pass(output.latents, 2) - low_pass(reference, 2)
        assert gap.square().mean().sqrt() < 1e-4


@pytest.mark.parametrize(
    "call",
    [
        {"guidance": "apg"},
        {"guidance": "cfg++"},
        {"also": ["a hat:0.7"], "negative_prompt": "a dog"},
        {"edits": ["pag:3", "threshold:0.995"]},
        {"guidance_interval": (0.3, 5.0)},
    ],
    ids=str,
)
def test_every_guidance_takes_it_along(call: dict[str, Any]) -> None:
    """Scale 0 is a run without it; in guess mode the negative branch is not told."""

    def drawn(**settings: Any) -> torch.Tensor:
        control = Control(network(), picture(1, (16, 16)), **settings)
        given = {"edits": (), "num_inference_steps": 3, "seed": 5, "output_type": "pt"}
        pipe = LatentDiffusionPipeline(model())
        return pipe("a cat", controls=[control], progress=False, **given | call).images

    whole, off, guessed = drawn(), drawn(scale=0), drawn(guess=True)
    without = LatentDiffusionPipeline(model())(
        "a cat", num_inference_steps=3, seed=5, output_type="pt", progress=False, **call
    ).images
    assert torch.equal(off, without)
    assert (whole - off).abs().max() > 0.01
    assert (guessed - whole).abs().max() > 0.001


def test_the_packed_engine_and_other_precisions_take_it_along() -> None:
    control = Control(network(), picture(1))
    bundle = model()
    packed = replace(bundle, network=PackedNetwork.of(bundle.network))
    whole = draw(controls=[control]).images
    assert (draw(bundle=packed, controls=[control]).images - whole).abs().max() < 1e-4
    other = Control(network().on(torch.device("cpu"), torch.bfloat16), picture(1))
    near = draw(controls=[other]).images  # a copy in the model's own precision
    assert other.loaded.dtype == torch.bfloat16
    assert 0 < (near - whole).abs().max() < 0.1


def test_pictures_of_a_batch_and_sizes_of_a_run() -> None:
    """One picture for all, for each prompt or for each picture of it; resized, never stretched."""
    pipe = LatentDiffusionPipeline(model())

    def drawn(images: Any, prompts: list[str], first: int = 0, **more: Any) -> torch.Tensor:
        given = {"num_inference_steps": 2, "seed": 5, "output_type": "pt", "progress": False}
        control = Control(network(), images)
        return pipe(prompts, controls=[control], first=first, **given | more).images

    a, b, c, d = (picture(number, (16, 16)) for number in range(4))
    two = ["a red heart", "a cat"]
    both = drawn([a, b], two, num_images_per_prompt=2)
    every = drawn([a, b, c, d], two, num_images_per_prompt=2)
    for index, one in enumerate((a, a, b, b)):
        alone = drawn(one, [two[index // 2]], first=index)
        assert (both[index] - alone[0]).abs().max() < 1e-5
    assert torch.equal(every[0], both[0])
    assert (every[2] - drawn(c, [two[1]], first=2)[0]).abs().max() < 1e-5
    large = a.resize((32, 32), Image.Resampling.NEAREST)
    small = large.resize((16, 16), Image.Resampling.LANCZOS)
    one = ["a cat"]
    assert drawn(large, one).shape[-2:] == (32, 32)
    assert torch.equal(drawn(large, one, height=16, width=16), drawn(small, one))
    for images, prompts, more, told in (
        ([a, b, c], two, {}, "3 pictures were given for 2 prompts"),
        (picture(0, (32, 16)), one, {"height": 16, "width": 16}, "without being stretched"),
    ):
        with pytest.raises(UserError, match=told):
            drawn(images, prompts, **more)


def test_what_makes_no_sense_is_refused() -> None:
    a = picture(0)
    for more, told in (
        ({"scale": float("nan")}, "finite"),
        ({"start": 0.6, "end": 0.5}, "start < end"),
        ({"end": 1.5}, "start < end"),
        ({"image": []}, "empty"),
    ):
        with pytest.raises(UserError, match=told):
            Control(**{"network": network(), "image": a, **more})
    with pytest.raises(UserError, match=r"controls: give Control\(network, picture\)"):
        draw(controls=[a])
    with pytest.raises(UserError, match="none of the run's 3 steps"):
        draw(controls=[Control(network(), a, start=0.4, end=0.5)])
    others: list[tuple[dict[str, Any], str]] = [
        ({"in_channels": 8}, "latents of 8 channels"),
        ({"layers_per_block": 3}, r"levels of \[3, 3\] layers"),
        ({"block_out_channels": [64, 64]}, r"levels of widths \[64, 64\]"),
    ]
    for config, told in others:
        other: Any = tiny_control(**config)
        foreign = ControlNetwork(ControlNet(dict(other.config)), "theirs")
        with pytest.raises(UserError, match=f"theirs is for {told}"):
            LatentDiffusionPipeline(model()).prepare(
                Request(prompt="a cat", controls=[Control(foreign, a)])
            )


@given(radius=st.integers(6, 26), value=st.integers(80, 255), dark=st.booleans())
@settings(max_examples=25, deadline=None)
def test_edges_of_a_disc_are_its_rim(radius: int, value: int, dark: bool) -> None:
    """Within two pixels of it, all the way round, and nowhere else; alike when turned."""
    image = Image.new("RGB", (64, 64), "white" if dark else "black")
    centre = 31.5
    box = (centre - radius, centre - radius, centre + radius, centre + radius)
    shade = 255 - value if dark else value
    ImageDraw.Draw(image).ellipse(box, fill=(shade, shade, shade))
    found = edges(image)
    ys, xs = found.nonzero(as_tuple=True)
    away = torch.hypot(xs - centre, ys - centre) - radius
    assert away.abs().max() <= 2
    angles = (torch.atan2(ys - centre, xs - centre) / torch.pi * 12 + 12).long().clamp(max=23)
    assert len(angles.unique()) == 24  # every fifteen degrees
    assert found.sum() < 3 * torch.pi * radius  # thin


def test_hysteresis_keeps_what_touches_a_strong_edge() -> None:
    """A step that fades along its line is kept to where it is weak, and a weak one alone is not."""
    pixels = np.zeros((40, 48), dtype=np.uint8)
    pixels[:, 12:24] = np.linspace(160, 45, 40, dtype=np.uint8)[:, None]
    pixels[30:, 36:] = 40
    image = Image.fromarray(pixels).convert("RGB")
    found = edges(image, 100, 300)
    assert found[2:36, 10:14].any(1).all()
    assert not found[:, 32:].any()
    assert edges(image, 100, 100)[30:, 32:].any()
    assert not edges(Image.new("RGB", (9, 7), "pink")).any()
    with pytest.raises(UserError, match="low <= high"):
        edges(image, 200, 100)


def test_a_long_weak_line_takes_no_longer_than_its_length() -> None:
    """A snake of 180,000 pixels that begins strong is kept to its end."""
    size = torch.zeros(601, 600)
    size[::2] = 150
    for row in range(1, 600, 2):
        size[row, -1 if row % 4 == 1 else 0] = 150
    size[0, 0] = 300
    begin = time.process_time()
    found = _hysteresis(size > 0, size, 100, 200)
    assert time.process_time() - begin < 30
    assert torch.equal(found, size > 0)
    size[0, 0] = 150
    assert not _hysteresis(size > 0, size, 100, 200).any()


def test_control_pictures_are_of_the_size_and_kind_asked_for() -> None:
    image = picture(3, (40, 24)).resize((80, 48))
    for kind in names():
        made = control_picture(image, kind)
        assert (made.mode, made.size) == ("RGB", image.size), kind
        assert (made == image) == (kind == "picture")
    for kind in ("canny", "scribble"):
        assert set(np.unique(np.asarray(control_picture(image, kind)))) == {0, 255}
    blocks = np.asarray(control_picture(image, "palette"))
    assert len(np.unique(blocks.reshape(-1, 3), axis=0)) <= 8 * 5
    plain = Image.new("RGB", (33, 20), (9, 80, 200))
    for kind in ("palette", "tile"):
        assert control_picture(plain, kind) == plain
    with pytest.raises(UserError, match="did you mean"):
        control_picture(image, "cany")
