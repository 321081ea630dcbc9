"""Ready-made states in place of prompts: what the prompts would draw, and clear refusals."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import WIDTH, tiny_bundle, unet_of
from torch import Tensor

from latentdiff import Autoguidance, LatentDiffusionPipeline, UserError
from latentdiff.diffusion.condition import Condition
from latentdiff.pipeline import PipelineOutput, Request
from latentdiff.pipeline.texts import _ready, texts_of

CLIP = LatentDiffusionPipeline(tiny_bundle())
T5 = LatentDiffusionPipeline(tiny_bundle(tower="t5"))
CLOSE = 3e-5  # of [0, 1]: padded rows and other batch sizes round otherwise
PIPES = pytest.mark.parametrize("pipe", [CLIP, T5], ids=["clip", "t5"])
SHORT, LONG = "a cat", "a red heart, flat"


def draw(pipe: LatentDiffusionPipeline, **changed: Any) -> PipelineOutput:
    arguments = {"num_inference_steps": 3, "output_type": "latent", "progress": False, "seed": 3}
    return pipe(**arguments | changed)


def encoded(pipe: LatentDiffusionPipeline, *prompts: str) -> Condition:
    """Prompts in a batch of their own, so that T5's length is that of the longest of them."""
    with torch.no_grad():
        return pipe.bundle.conditioner.encode(list(prompts), pipe.bundle.size).condition


def states(pipe: LatentDiffusionPipeline, *prompts: str) -> Tensor:
    found = encoded(pipe, *prompts).states
    assert found is not None
    return found


def gap(one: PipelineOutput, other: PipelineOutput) -> float:
    assert one.images.shape == other.images.shape
    return float((one.images - other.images).abs().max())


def test_the_lengths_do_differ() -> None:
    lengths = [states(T5, text).shape[1] for text in (SHORT, LONG, "")]
    assert len(set(lengths)) == 3
    assert len({states(CLIP, text).shape[1] for text in (SHORT, LONG, "")}) == 1


@PIPES
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 1},
        {"guidance": "apg", "guidance_interval": (0.5, 3.0)},
        {"also": [("a slice", 0.6)]},
        {"also": [("a slice", 0.6)], "guidance_scale": 1},
        {"edits": ["pag:2"], "solver": "ddpm"},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_states_draw_what_their_prompt_draws(
    pipe: LatentDiffusionPipeline, settings: dict[str, Any]
) -> None:
    for prompt in (SHORT, LONG):
        words = draw(pipe, prompt=prompt, num_images_per_prompt=2, **settings)
        ready = encoded(pipe, prompt)
        as_condition = draw(pipe, prompt_embeds=ready, num_images_per_prompt=2, **settings)
        as_tensor = draw(pipe, prompt_embeds=ready.states, num_images_per_prompt=2, **settings)
        assert gap(as_condition, words) < CLOSE
        assert gap(as_tensor, words) < CLOSE  # nothing is padded in a batch of one
        assert as_tensor.nfe == words.nfe
        assert as_tensor.cut == ["", ""]
    other = draw(pipe, prompt_embeds=states(pipe, SHORT), num_images_per_prompt=2, **settings)
    assert gap(other, words) > 1e-3


@PIPES
def test_several_prompts_and_their_negatives(pipe: LatentDiffusionPipeline) -> None:
    """Rows in their order, each for its pictures; a negative of one row is that of all."""
    two = encoded(pipe, SHORT, LONG)
    words = draw(pipe, prompt=[SHORT, LONG], negative_prompt="pizza", num_images_per_prompt=2)
    for away in (
        {"negative_prompt": "pizza"},
        {"negative_prompt_embeds": encoded(pipe, "pizza")},
        {"negative_prompt_embeds": states(pipe, "pizza")},
        {"negative_prompt_embeds": encoded(pipe, "pizza", "pizza")},
    ):
        ready = draw(pipe, prompt_embeds=two, num_images_per_prompt=2, **away)
        assert gap(ready, words) < CLOSE
    mixed = draw(
        pipe,
        prompt=[SHORT, LONG],
        negative_prompt_embeds=encoded(pipe, "pizza"),
        num_images_per_prompt=2,
    )
    assert gap(mixed, words) < CLOSE
    each = draw(pipe, prompt=[SHORT, LONG], negative_prompt=["pizza", LONG])
    away = encoded(pipe, "pizza", LONG)
    assert gap(draw(pipe, prompt_embeds=two, negative_prompt_embeds=away), each) < CLOSE
    swapped = draw(pipe, prompt_embeds=two.take([1, 0]), negative_prompt_embeds=away)
    assert gap(swapped, each) > 1e-3


def test_states_of_t5_without_a_mask_may_be_as_long_as_others_with_one() -> None:
    """The length of the states must not decide whether they are taken."""
    length = states(T5, SHORT).shape[1]
    assert states(T5, "cat a").shape[1] == length
    words = draw(T5, prompt=SHORT, negative_prompt="cat a")
    ready = draw(T5, prompt_embeds=states(T5, SHORT), negative_prompt="cat a")
    assert gap(ready, words) < CLOSE


def test_states_may_be_in_half_precision_and_want_gradients() -> None:
    ready = states(CLIP, SHORT)
    words = draw(CLIP, prompt=SHORT)
    output = draw(CLIP, prompt_embeds=ready.clone().requires_grad_())
    assert gap(output, words) < CLOSE
    assert not output.latents.requires_grad
    assert gap(draw(CLIP, prompt_embeds=ready.double()), words) < CLOSE
    assert gap(draw(CLIP, prompt_embeds=ready.bfloat16()), words) < 0.2


def test_states_are_brought_to_the_device_of_the_model() -> None:
    """To "meta" here, where no test needs another device."""
    bundle: Any = SimpleNamespace(
        device=torch.device("meta"),
        network=CLIP.bundle.network,
        conditioner=CLIP.bundle.conditioner,
    )
    given = Condition(states=ONE, mask=torch.ones(1, 5, dtype=torch.bool))
    texts = texts_of(Request(prompt_embeds=given, num_images_per_prompt=2))
    moved = _ready(given, texts, bundle, "prompt_embeds").given()
    assert {name: (value.device.type, len(value)) for name, value in moved.items()} == {
        "states": ("meta", 2),
        "mask": ("meta", 2),
    }


ONE = torch.zeros(1, 5, WIDTH)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "give a prompt, or prompt_embeds"),
    "both": ({"prompt": SHORT, "prompt_embeds": ONE}, "not both"),
    "both negatives": (
        {"prompt": SHORT, "negative_prompt": "x", "negative_prompt_embeds": ONE},
        "negative_prompt: .*not both",
    ),
    "no batch": ({"prompt_embeds": ONE[0]}, r"prompt_embeds: give states \[P, L, D\]"),
    "no rows": ({"prompt_embeds": ONE[:0]}, r"prompt_embeds: give states \[P, L, D\]"),
    "no tokens": ({"prompt_embeds": ONE[:, :0]}, r"prompt_embeds: give states \[P, L, D\]"),
    "no tensor": ({"prompt_embeds": np.zeros((1, 5, WIDTH))}, r"prompt_embeds: give states"),
    "words": ({"prompt_embeds": "a cat"}, "prompt_embeds: give states"),
    "no states": ({"prompt_embeds": Condition(pooled=ONE[0])}, "prompt_embeds: give states"),
    "another width": ({"prompt_embeds": ONE[..., 1:]}, f"states of width {WIDTH}, not {WIDTH - 1}"),
    "not finite": ({"prompt_embeds": ONE * torch.nan}, "prompt_embeds: .*NaN or infinity"),
    "whole numbers": ({"prompt_embeds": ONE.long()}, "prompt_embeds: give states"),
    "too many negatives": (
        {"prompt_embeds": ONE, "negative_prompt_embeds": torch.zeros(2, 5, WIDTH)},
        "negative_prompt_embeds: 2 rows were given for 1 prompts",
    ),
    "a negative of another width": (
        {"prompt": SHORT, "negative_prompt_embeds": ONE[..., 1:]},
        "negative_prompt_embeds: the model attends",
    ),
    "a mask of another length": (
        {"prompt_embeds": Condition(states=ONE, mask=torch.ones(1, 4, dtype=torch.bool))},
        "prompt_embeds: its mask",
    ),
    "a mask of numbers": (
        {"prompt_embeds": Condition(states=ONE, mask=torch.ones(1, 5))},
        "prompt_embeds: its mask",
    ),
    "rows that differ": (
        {"prompt_embeds": Condition(states=ONE.repeat(2, 1, 1), pooled=torch.zeros(1, 3))},
        "prompt_embeds: .*rows",
    ),
    "sizes that nothing is told": (
        {"prompt_embeds": Condition(states=ONE, sizes=torch.zeros(1, 6))},
        "prompt_embeds: this model is told no sizes; leave them out",
    ),
    "autoguidance": (
        {"prompt_embeds": ONE, "edits": [Autoguidance(CLIP.bundle)]},
        "autoguidance .*prompt",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_states_are_one_line_before_any_drawing(case: str) -> None:
    settings, said = BAD[case]

    def refuse(*_: object) -> None:
        raise AssertionError("the network was called")

    hook = unet_of(CLIP.bundle).register_forward_pre_hook(refuse)
    try:
        with pytest.raises(UserError, match=said) as caught:
            draw(CLIP, **settings)
    finally:
        hook.remove()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
