"""Image prompts with every edit, control, LoRA, guidance and engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_edit import EDITS, SIZE, SOLVERS, hole, picture
from PIL import Image
from tiny import sd_like, tiny_bundle, tiny_control, tiny_ip_adapter, with_own_networks
from torch import Tensor

from latentdiff import (
    Control,
    ImagePrompt,
    LatentDiffusionPipeline,
    TiledDiffusion,
    UserError,
)
from latentdiff.bundle import Bundle
from latentdiff.diffusion.condition import Condition, ImageTokens, joined
from latentdiff.editing.lowpass import low_pass
from latentdiff.formats.ip_adapter import load_ip_adapter
from latentdiff.lora import add_lora
from latentdiff.models.attention import set_attention
from latentdiff.models.engines import PackedNetwork
from latentdiff.models.image_prompts import ImageAdapter
from latentdiff.pictures import to_tensor


@pytest.fixture(scope="module")
def model() -> Bundle:
    return with_own_networks(tiny_bundle())


@pytest.fixture(scope="module")
def adapter(model: Bundle, tmp_path_factory: pytest.TempPathFactory) -> ImageAdapter:
    return load_ip_adapter(tiny_ip_adapter(tmp_path_factory.mktemp("ip"), model.network, "plus"))


def draw(bundle: Bundle, *edits: Any, **call: Any) -> Any:
    given: dict[str, Any] = {"num_inference_steps": 3, "seed": 5, "output_type": "pt"}
    given |= {"progress": False}
    pipe = LatentDiffusionPipeline(bundle)
    return pipe("a red heart", edits=edits, **given | call)


@pytest.mark.parametrize("edit", EDITS)
def test_with_every_edit_and_solver_beside_a_control_and_a_lora(
    edit: str, adapter: ImageAdapter, tmp_path: Path
) -> None:
    """Each is seen beside the others; known pixels stay, and the reference's low frequencies."""
    bundle = with_own_networks(tiny_bundle())
    tiny_control().save_pretrained(tmp_path / "net")
    controls = [Control(tmp_path / "net", picture(1))]
    shown = [ImagePrompt(adapter, picture(2))]
    given = to_tensor(picture(0))
    for solver in SOLVERS:
        both = draw(bundle, *EDITS[edit], solver=solver, controls=controls, image_prompts=shown)
        images = both.images
        assert images.shape == (1, 3, *SIZE[::-1])
        assert bool(torch.isfinite(images).all())
        without = draw(bundle, *EDITS[edit], solver=solver, controls=controls).images
        assert (images - without).abs().max() > 0.01, solver
        if edit in ("SDEdit", "RePaint"):
            known = torch.from_numpy(np.asarray(hole()) == 0)
            assert torch.equal(images[0][:, known], (given / 2 + 0.5)[:, known])
        if edit == "ILVR":
            padded = torch.nn.functional.pad(given[None], (0, 1, 0, 1), mode="replicate")
            with torch.no_grad():
                reference = bundle.autoencoder.encode(padded)
            gap = low_pass(both.latents, 2) - low_pass(reference, 2)
            assert gap.square().mean().sqrt() < 1e-4
    for parameter in add_lora(bundle, rank=2):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    told: dict[str, Any] = {"solver": "ddim", "controls": controls}
    with_lora = draw(bundle, *EDITS[edit], **told, image_prompts=shown).images
    assert (draw(bundle, *EDITS[edit], **told).images - with_lora).abs().max() > 0.01
    plain = draw(with_own_networks(tiny_bundle()), *EDITS[edit], **told, image_prompts=shown)
    assert (plain.images - with_lora).abs().max() > 0.01


@pytest.mark.parametrize(
    "call",
    [
        {"guidance": "apg"},
        {"guidance": "cfg++"},
        {"also": ["a hat:0.7"], "negative_prompt": "a dog"},
        {"edits": ["pag:3", "threshold:0.995"]},
        {"edits": [TiledDiffusion(window=(6, 6))]},
        {"edits": ["hires:2:0.5"]},
        {"guidance_interval": (0.3, 5.0)},
    ],
    ids=str,
)
def test_every_guidance_takes_it_along(
    call: dict[str, Any], model: Bundle, adapter: ImageAdapter
) -> None:
    """Scale 0 is a run without it; several pictures, and several prompts, add up."""

    def drawn(*prompts: ImagePrompt) -> Tensor:
        rest: dict[str, Any] = {name: value for name, value in call.items() if name != "edits"}
        return draw(model, *call.get("edits", ()), image_prompts=prompts, **rest).images

    one, two = (ImagePrompt(adapter, picture(seed)) for seed in (1, 2))
    found = [drawn(), drawn(one), drawn(two), drawn(one, two)]
    found.append(drawn(ImagePrompt(adapter, [picture(1), picture(2)])))
    for place, images in enumerate(found):
        for other in found[:place]:
            assert (images - other).abs().max() > 0.01
    assert torch.equal(drawn(ImagePrompt(adapter, picture(1), scale=0)), found[0])
    assert torch.equal(drawn(one, ImagePrompt(adapter, picture(2), 0)), found[1])


def test_nothing_is_a_picture_of_the_mean_colour(adapter: ImageAdapter) -> None:
    mean = Image.new("RGB", SIZE, (123, 117, 104))  # OpenAI's mean, in levels of 255
    tokens, blank = adapter.tokens([mean]), adapter.blank_tokens(1)
    assert (tokens - blank).abs().max() < 0.2
    assert (adapter.tokens([picture(1)]) - blank).abs().max() > 1
    assert (adapter.blank_tokens(2) - torch.cat([blank, blank], dim=1)).abs().max() < 1e-5


def test_a_picture_is_seen_in_the_middle_whatever_its_shape(adapter: ImageAdapter) -> None:
    """Of a line of a million pixels as many are resized as are seen."""
    square = picture(1, (12, 12))  # the encoder's own size
    for wide, high in ((30, 12), (12, 30), (200, 12)):
        image = Image.new("RGB", (wide, high), "red")
        image.paste(square, ((wide - 12) // 2, (high - 12) // 2))
        assert torch.equal(adapter.tokens([image]), adapter.tokens([square]))
    assert not torch.equal(adapter.tokens([Image.new("RGB", (12, 12))]), adapter.tokens([square]))
    assert bool(torch.isfinite(adapter.tokens([Image.new("RGB", (1_000_000, 1), "red")])).all())


@pytest.fixture
def engines(model: Bundle) -> dict[str, Bundle]:
    return {
        "packed": replace(model, network=PackedNetwork.of(model.network)),
        "explicit": with_attention("eager"),
        "fused": with_attention("sdpa"),
    }


def with_attention(name: Any) -> Bundle:
    bundle = with_own_networks(tiny_bundle())
    set_attention(bundle.network.module, name)
    return bundle


def test_every_engine_and_precision_takes_it_along(
    model: Bundle, engines: dict[str, Bundle], adapter: ImageAdapter
) -> None:
    """Spoilt attention, too; and it is the fast weights that are computed with."""
    shown = [ImagePrompt(adapter, picture(1), 0.8)]
    for edits in ([], ["pag:3"]):
        whole = draw(model, *edits, image_prompts=shown).images
        for name, bundle in engines.items():
            found = draw(bundle, *edits, image_prompts=shown).images
            assert (found - whole).abs().max() < 1e-4, name
    packed = engines["packed"].network
    assert isinstance(packed, PackedNetwork)
    assert packed.packing.twin() is not None
    other = adapter.on(torch.device("cpu"), torch.bfloat16)
    near = draw(model, image_prompts=[ImagePrompt(other, picture(1), 0.8)]).images
    assert other.dtype == torch.bfloat16
    whole = draw(model, image_prompts=shown).images
    assert 0 < (near - whole).abs().max() < 0.1


def test_each_picture_of_a_batch_is_what_it_is_alone(model: Bundle, adapter: ImageAdapter) -> None:
    shown = [ImagePrompt(adapter, picture(1))]
    pipe = LatentDiffusionPipeline(model)
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 5, "output_type": "pt"}
    call |= {"image_prompts": shown, "progress": False}
    both = pipe(["a red heart", "a cat"], **call).images
    for index, prompt in enumerate(["a red heart", "a cat"]):
        assert (pipe(prompt, first=index, **call).images[0] - both[index]).abs().max() < 1e-5


def test_tokens_are_taken_and_joined_by_rows(adapter: ImageAdapter) -> None:
    tokens = torch.arange(3.0)[:, None, None].expand(3, 2, 4)
    states = torch.zeros(3, 5, 16)
    whole = Condition(states=states, images=(ImageTokens(adapter, tokens, 0.5),))
    parts = [whole.take([2]), whole.take([0])]
    assert torch.equal(joined(parts).images[0].tokens, tokens[[2, 0]])
    others = ((), (ImageTokens(adapter, tokens, 0.6),), (ImageTokens(adapter, tokens[:, :1], 0.5),))
    for other in (Condition(states=states, images=images) for images in others):
        with pytest.raises(UserError, match="same image prompts"):
            joined([whole, other])


def test_what_makes_no_sense_is_refused(
    model: Bundle, adapter: ImageAdapter, tmp_path: Path
) -> None:
    senseless: list[tuple[dict[str, Any], str]] = [
        *(({"scale": scale}, "finite") for scale in (float("nan"), "0.5", None, True, 10**400)),
        ({"image": []}, "empty"),
        ({"encoder": "x"}, "has its encoder"),
    ]
    for more, told in senseless:
        with pytest.raises(UserError, match=told):
            ImagePrompt(**{"adapter": adapter, "image": picture(0), **more})
    shown = [ImagePrompt(adapter, picture(0))]
    with pytest.raises(UserError, match=r"image_prompts: give ImagePrompt\(adapter, picture\)"):
        draw(model, image_prompts=[picture(0)])
    with pytest.raises(UserError, match="is a UNet2DConditionModel, which is shown no pic"):
        draw(tiny_bundle(), image_prompts=shown)
    wide = with_own_networks(sd_like(1))
    with pytest.raises(UserError, match=r"for text states of width 16, the model has .* 64: it be"):
        draw(wide, image_prompts=shown)
    more = tiny_ip_adapter(tmp_path, with_own_networks(sd_like(1, layers=1)).network)
    with pytest.raises(UserError, match="is for 7 cross-attention layers, the model has 11"):
        draw(wide, image_prompts=[ImagePrompt(more, picture(0))])
