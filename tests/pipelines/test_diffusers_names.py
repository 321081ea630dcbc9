"""What users of diffusers type: it works as there, or one line says what does it here."""

import copy
import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from tiny import tiny_bundle

from latentdiff import Bundle, LatentDiffusionPipeline, UserError
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.pictures import open_picture
from latentdiff.pipeline.diffusers_names import ANSWERS

PIPE = LatentDiffusionPipeline(tiny_bundle())
STEPS = 4


def draw(**changed: Any) -> Any:
    settings = {"num_inference_steps": STEPS, "seed": 7, "progress": False, "output_type": "pt"}
    return PIPE("a red heart", **(settings | changed))


def test_their_callback_is_told_here_what_it_is_told_there(tmp_path: Path) -> None:
    theirs: Any = StableDiffusionPipeline.from_pretrained(PIPE.bundle.save(tmp_path / "model"))
    theirs.set_progress_bar_config(disable=True)
    latents = NoiseStreams(5).draw((4, 8, 8))
    told: dict[str, list[tuple[int, float, torch.Tensor]]] = {}
    for name, pipe in (("here", PIPE), ("there", theirs)):
        seen = told[name] = []

        def callback(
            it: object, step: int, time: torch.Tensor, kwargs: dict[str, Any], seen: Any = seen
        ) -> dict[str, Any]:
            assert it in (PIPE, theirs)
            seen.append((step, float(time), kwargs["latents"].clone()))
            if step == 1:
                kwargs["latents"] = kwargs["latents"].flip(-1)
            return kwargs

        pipe(
            "a red heart",
            latents=latents,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents"],
        )
    assert len(told["here"]) == len(told["there"]) == STEPS
    for (step, time, x), (their_step, their_time, their_x) in zip(*told.values(), strict=True):
        assert (step, time) == (their_step, their_time)
        assert (x - their_x).abs().max() < 1e-4 * their_x.abs().max()


def test_a_callback_that_returns_nothing_or_stands_beside_ours() -> None:
    plain = draw()
    steps: list[int] = []
    assert torch.equal(draw(callback_on_step_end=lambda *_: None).images, plain.images)
    both = draw(
        callback_on_step_end=lambda _, step, *__: steps.append(step),
        on_move=lambda index, *_: steps.append(index),
    )
    assert torch.equal(both.images, plain.images)
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]


class Cutoff:
    tensor_inputs = ("prompt_embeds",)

    def __call__(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    "wrong",
    [
        {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
        {"callback_on_step_end": Cutoff()},
        {"callback_on_step_end": lambda *_: {"prompt_embeds": 1}},
        {"callback_on_step_end": lambda *_: torch.ones(1)},
    ],
)
def test_a_callback_for_what_a_step_does_not_show_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="callback_on_step_end"):
        draw(**({"callback_on_step_end": lambda *_: None} | wrong))


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_name_of_theirs_is_answered_in_a_line(name: str) -> None:
    there = getattr(LatentDiffusionPipeline, name, None)
    assert there is None or (isinstance(there, property) and there.fset is None)  # to look at
    line = f"{name}: {ANSWERS[name]}."
    assert len(line) < 200
    pipe: Any = PIPE
    asked: list[Callable[[], object]] = [lambda: setattr(pipe, name, None)]
    if there is None:
        assert not hasattr(pipe, name)
        with pytest.raises(AttributeError, match=re.escape(line)):
            getattr(pipe, name)()
    for call in (pipe.__call__, pipe.from_pretrained):
        if name not in inspect.signature(call).parameters:
            asked.append(partial(call, **{name: None}))
    for ask in asked:
        with pytest.raises(UserError, match=re.escape(line)):
            ask()


def test_the_docs_have_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text("utf-8")
    for told in dict.fromkeys(ANSWERS.values()):
        names = ", ".join(f"`{name}`" for name, answer in ANSWERS.items() if answer == told)
        assert f"| {names} | {told} |\n" in page


def test_the_answers_name_what_there_is() -> None:
    names = {
        found for told in ANSWERS.values() for found in re.findall(r"latentdiff\.[\w.]+", told)
    }
    assert names
    for name in names:
        room, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(room), last), name
    for told in ("load_lora", "set_loras", "remove_lora", "fuse_loras", "prepare", "bundle"):
        assert hasattr(PIPE, told)


def test_other_names_are_pythons_own_mistakes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unett'"):
        PIPE.unett  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError, match="promptt"):
        PIPE(promptt="a cat")  # pyright: ignore[reportCallIssue]
    assert copy.copy(PIPE).bundle is PIPE.bundle


def test_what_has_an_equal_is_one(tmp_path: Path) -> None:
    assert PIPE.unet is PIPE.bundle.modules["unet"]
    assert PIPE.vae is PIPE.bundle.modules["vae"]
    assert (PIPE.device.type, PIPE.dtype) == ("cpu", torch.float32)
    PIPE.save_pretrained(tmp_path / "model")
    half = LatentDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    with pytest.raises(UserError, match="dtype and torch_dtype"):
        LatentDiffusionPipeline.from_pretrained(dtype="float32", torch_dtype=torch.bfloat16)
    PIPE.save_pretrained(tmp_path / "one.safetensors")
    again = LatentDiffusionPipeline.from_single_file(tmp_path / "one.safetensors")
    output = draw(return_dict=False)
    images, flagged = output
    assert flagged is None
    assert output[0] is output.images is images
    drawn = again("a red heart", **settings()).images
    assert (drawn - images).abs().max() < 1e-4  # an engine may draw one of them


def settings() -> dict[str, Any]:
    return {"num_inference_steps": STEPS, "seed": 7, "progress": False, "output_type": "pt"}


def test_a_lora_is_loaded_by_their_name(tmp_path: Path) -> None:
    taught, pipe = tiny_bundle(), LatentDiffusionPipeline(tiny_bundle())
    for parameter in add_lora(taught, rank=2):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    save_lora(lora_of(taught), tmp_path / "style.safetensors")
    plain = pipe("a red heart", **settings()).images
    assert (
        pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="s") is None
    )
    assert (pipe("a red heart", **settings()).images - plain).abs().max() > 0.01
    pipe.remove_lora("s")
    pipe.load_lora_weights(tmp_path / "style.safetensors")
    pipe.remove_lora("style")
    assert torch.equal(pipe("a red heart", **settings()).images, plain)


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_pipeline_model_and_output_show_themselves(kind: str) -> None:
    one, many = draw(output_type=kind), draw(output_type=kind, num_images_per_prompt=9)
    for shown in map(repr, (PIPE, PIPE.bundle, one, many)):
        assert "\n" not in shown
        assert len(shown) < 200
    assert "9 pictures, seed 7" in repr(many)
    assert "16 x 16 pixels" in repr(PIPE)
    assert isinstance(PIPE.bundle, Bundle)
    picture = open_picture(one._repr_png_())
    expected = draw(output_type="pil").images[0]
    assert picture.tobytes() == expected.tobytes()
    assert open_picture(many._repr_png_()).size == (8 * 16, 2 * 16)
    assert isinstance(expected, Image.Image)
    assert draw(output_type="latent")._repr_png_() is None
