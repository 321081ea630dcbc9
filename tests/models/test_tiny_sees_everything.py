"""Every input of the tests' tiny networks moves their output, each one alone.

Only of such networks do equal pictures prove that both sides were told the same. A U-Net of one
channel a group, for one, knows no time: its norms subtract the time embedding again.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tiny import (
    STATISTICS,
    WIDTH,
    WIDTH_2,
    WINDOW,
    sd_unet,
    tiny_classifier,
    tiny_clip,
    tiny_clip_of_pictures,
    tiny_control,
    tiny_penultimate,
    tiny_pixart,
    tiny_t5,
    tiny_unet,
    tiny_vae,
    tiny_xl,
)
from torch import Tensor

from latentdiff.models.cross_attention_unet import GeneratorUNet
from latentdiff.models.guidance_embedding import embedded_scale
from latentdiff.models.text_encoders import TextTower
from latentdiff.models.unet import build_unet

ENOUGH = 0.05  # of the standard deviation of the output
LITTLE = 0.01  # enough for a small change: of one time and the next, of one state out of twelve
PROMPTS = ["a red heart", "the flag of a small island"]
TOWERS: dict[str, Callable[[], TextTower]] = {"clip": tiny_clip, "t5": tiny_t5}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def other(value: Tensor, *at: Any) -> Tensor:
    """The same values but for those at an index, which are drawn anew in the size of the rest."""
    changed = value.clone()
    fresh = noise(*value.shape, seed=1) * value.std() + value.mean()
    changed[at] = fresh[at]
    return changed


def moved(one: Tensor, changed: Tensor) -> float:
    """Root mean square of the change, in standard deviations of the output."""
    assert one.dtype == torch.float32
    assert bool(torch.isfinite(one).all())
    return float((changed - one).square().mean().sqrt() / one.std())


def sees(network: Callable[..., Any], told: dict[str, Any], changes: dict[str, Any]) -> None:
    """Each change alone, an argument replaced, moves every part that the network returns."""
    parts = network(**told)
    for name, change in changes.items():
        enough = LITTLE if name.startswith(("next", "hidden")) else ENOUGH
        for part, another in zip(parts, network(**told | change), strict=True):
            assert moved(part, another) > enough, name


def latents_and_text(states: Tensor, channels: int, size: int = 8) -> tuple[dict, dict]:
    """Inputs of a U-Net, and a change to each of them."""
    told = {
        "x": noise(len(states), channels, size, size),
        "t": torch.full((len(states),), 500.0),
        "states": states,
    }
    changes: dict[str, Any] = {
        f"channel {channel}": {"x": other(told["x"], slice(None), channel)}
        for channel in range(channels)
    }
    for t in (0.0, 250.0, 999.0):
        changes[f"time {t}"] = {"t": torch.full((len(states),), t)}
    changes["next time"] = {"t": told["t"] + 1}
    changes["other prompt"] = {"states": states.flip(0)}
    return told, changes


def positions(states: Tensor) -> dict[str, Any]:
    return {f"state {p}": {"states": other(states, slice(None), p)} for p in range(WINDOW)}


def output_of(unet: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The U-Net's output in parts of as many channels as latents have."""

    def network(x: Tensor, t: Tensor, states: Tensor, **more: Any) -> tuple[Tensor, ...]:
        output = unet(x, t, states, **more)
        return getattr(output, "sample", output).split(4, dim=1)

    return network


@torch.no_grad()
@pytest.mark.parametrize(
    ("tower", "in_channels", "out_channels"),
    [("clip", 4, 4), ("clip", 8, 4), ("clip", 9, 4), ("clip", 4, 8), ("t5", 4, 4), ("t5", 4, 8)],
)
def test_a_unet(tower: str, in_channels: int, out_channels: int) -> None:
    """Prompts are as long as the window; with 8 channels out the last 4 are a variance."""
    text = TOWERS[tower]().encode([f"{prompt}, flat style with pizza" for prompt in PROMPTS])
    told, changes = latents_and_text(text.states, in_channels)
    changes |= positions(text.states)
    if text.mask is not None:
        told["encoder_attention_mask"] = text.mask
        hide = {f"hidden {p}": torch.arange(WINDOW) == p for p in range(WINDOW)}
        hide["second half"] = torch.arange(WINDOW) >= WINDOW // 2
        for name, hidden in hide.items():
            changes[name] = {"encoder_attention_mask": text.mask & ~hidden}
    network = output_of(tiny_unet(in_channels, out_channels))
    sees(network, told, changes)
    prediction, *variance = network(**told)
    assert all(moved(prediction, part) > 1 for part in variance)


@torch.no_grad()
def test_a_unet_of_sizes_and_pooled_text() -> None:
    """As that of Stable Diffusion XL."""
    told, changes = latents_and_text(tiny_clip().encode(PROMPTS).states, 4)
    changes |= positions(told["states"])
    pooled = noise(2, WIDTH, seed=2)
    sizes = torch.tensor([[1024.0, 768, 0, 0, 512, 640]] * 2)

    def added(**changed: Tensor) -> dict[str, Any]:
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes, **changed}}

    changes["pooled"] = added(text_embeds=pooled.flip(0))
    for number in range(6):
        another = sizes.clone()
        another[:, number] += 256
        changes[f"size {number}"] = added(time_ids=another)
    sees(output_of(tiny_unet(sizes=True)), told | added(), changes)


@torch.no_grad()
@pytest.mark.parametrize("guess", [False, True])
def test_a_unet_beside_a_control_network(guess: bool) -> None:
    """All that the control network is told moves the U-Net's output by way of it alone."""
    told, changes = latents_and_text(tiny_clip().encode(PROMPTS).states, 4)
    unet, control, steady = tiny_unet(), tiny_control(), dict(told)
    told["picture"] = noise(2, 3, 16, 16).clamp(0, 1)
    for colour in range(3):
        changes[f"colour {colour}"] = {"picture": other(told["picture"], slice(None), colour)}
    changes["scale"] = {"conditioning_scale": 0.5}

    def network(
        x: Tensor, t: Tensor, states: Tensor, picture: Tensor, **more: Any
    ) -> tuple[Tensor, ...]:
        skips, middle = control(x, t, states, picture, guess_mode=guess, return_dict=False, **more)
        residuals = {"down_block_additional_residuals": skips}
        residuals["mid_block_additional_residual"] = middle
        return output_of(unet)(**steady, **residuals)

    sees(network, told, changes)


@torch.no_grad()
def test_a_unet_of_guidance_scales() -> None:
    """As that of a latent consistency model: 8, 8.5 and 1 are three things to it."""
    told, changes = latents_and_text(tiny_clip().encode(PROMPTS).states, 4)
    told["timestep_cond"] = embedded_scale([8.0, 8.0], 32)
    for scale in (8.5, 1.0):
        changes[f"scale {scale}"] = {"timestep_cond": embedded_scale([scale] * 2, 32)}
    sees(output_of(tiny_unet(guidance_width=32)), told, changes)


@torch.no_grad()
def test_a_generator() -> None:
    """Its noise, number by number."""
    unet = GeneratorUNet(json.loads(tiny_unet(guidance_width=8).to_json_string()))
    unet.load_state_dict(tiny_unet(guidance_width=8).state_dict())
    told, changes = latents_and_text(tiny_clip().encode(PROMPTS).states, 4)
    told["timestep_cond"] = torch.zeros(2, 8)
    for number in range(8):
        changes[f"number {number}"] = {"timestep_cond": torch.eye(8)[[number] * 2]}
    sees(output_of(unet), told, changes)


@torch.no_grad()
@pytest.mark.parametrize("labels", ["table", "waves"])
def test_a_unet_of_noise_levels(labels: Any) -> None:
    """As that of Stable Diffusion's x4 upscaler, with a small picture beside x_t."""
    told, changes = latents_and_text(tiny_clip().encode(PROMPTS).states, 7)
    told["class_labels"] = torch.tensor([20, 20])
    for level in (0, 100, 350):
        changes[f"level {level}"] = {"class_labels": torch.full((2,), level)}
    changes["next level"] = {"class_labels": torch.tensor([21, 21])}
    sees(output_of(tiny_unet(7, labels=labels)), told, changes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("refiner", "in_channels"), [(False, 4), (False, 8), (False, 9), (True, 4)]
)
def test_a_unet_of_stable_diffusion_xl(refiner: bool, in_channels: int) -> None:
    """Either encoder's states, each of their places, the pooled text and each number alone."""
    bundle = tiny_xl(refiner=refiner, in_channels=in_channels)
    condition = bundle.conditioner.encode([*PROMPTS, ""], (1024, 768)).condition
    nothing, condition = condition.take([2]), condition.take([0, 1])
    states, pooled, sizes = condition.states, condition.pooled, condition.sizes
    assert states is not None
    assert pooled is not None
    assert sizes is not None
    assert not any(bool(nothing.given()[name].any()) for name in ("states", "pooled"))
    told, changes = latents_and_text(states, in_channels)
    changes |= positions(states)
    for number, tower in enumerate(bundle.conditioner.towers):
        part = slice(0, WIDTH) if (number, refiner) == (0, False) else slice(-WIDTH_2, None)
        changes[tower] = {"states": other(states, slice(None), slice(None), part)}

    def added(**changed: Tensor) -> dict[str, Any]:
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes, **changed}}

    assert moved(pooled, pooled.flip(0)) > 0.5
    changes["pooled"] = added(text_embeds=pooled.flip(0))
    assert sizes.shape[1] == (5 if refiner else 6)
    for number in range(sizes.shape[1]):
        another = sizes.clone()
        another[:, number] += 2 if refiner and number == 4 else 256
        changes[f"size {number}"] = added(time_ids=another)
    sees(output_of(bundle.network.module), told | added(), changes)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [False, True])
def test_a_transformer_of_pixart(sizes: bool) -> None:
    """Each state that is not hidden, each number alone, and the place of every patch."""
    bundle = tiny_pixart(sizes=sizes, window=WINDOW)
    prompts = [f"{prompt}, flat style with pizza" for prompt in PROMPTS]
    condition = bundle.conditioner.encode(prompts, (64, 48)).condition
    states, mask, numbers = condition.states, condition.mask, condition.sizes
    assert states is not None
    assert mask is not None
    told, changes = latents_and_text(states, 4)
    changes |= positions(states)
    told["encoder_attention_mask"] = mask
    for place in range(WINDOW):
        hidden = torch.arange(WINDOW) == place
        changes[f"hidden {place}"] = {"encoder_attention_mask": mask & ~hidden}

    def added(sizes: Tensor) -> dict[str, Any]:
        return {"added_cond_kwargs": {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}}

    if sizes:
        assert numbers is not None
        assert numbers.shape == (2, 3)
        for number in range(3):
            another = numbers.clone()
            another[:, number] *= 2
            changes[f"number {number}"] = added(another)
        told |= added(numbers)
    module: Any = bundle.network.module

    def network(x: Tensor, t: Tensor, states: Tensor, **more: Any) -> tuple[Tensor, ...]:
        return module(x, states, t, **more).split(4, dim=1)

    sees(network, told, changes)
    prediction, variance = network(**told)
    assert moved(prediction, variance) > 1
    turned = network(**told | {"x": told["x"].flip(2, 3)})[0].flip(2, 3)
    assert moved(prediction, turned) > ENOUGH


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
def test_a_text_encoder_of_stable_diffusion_xl(number: Literal[1, 2]) -> None:
    """Each token moves the state of its place, the last one, and the pooled vector."""
    text = tiny_penultimate(number)
    tokens = text.tokenize(["a red heart with an arrow and the face of a sad dog"])
    whole = text.states(tokens)
    for place in range(WINDOW):
        ids = tokens.ids.clone()
        ids[:, place] = (ids[:, place] + 7) % 30
        changed = text.states(replace(tokens, ids=ids))
        for at in (place, WINDOW - 1):
            assert moved(whole.states[:, at], changed.states[:, at]) > ENOUGH, (place, at)
        if whole.pooled is not None and changed.pooled is not None:
            assert moved(whole.pooled, changed.pooled) > ENOUGH, place
    assert (whole.pooled is None) == (number == 1)


@torch.no_grad()
@pytest.mark.parametrize("version", [1, 2])
def test_a_unet_like_stable_diffusions(version: int) -> None:
    told, changes = latents_and_text(noise(2, WINDOW, 64, seed=2), 4)
    sees(output_of(sd_unet(version)), told, changes | positions(told["states"]))


@torch.no_grad()
def test_a_unet_as_training_begins_it() -> None:
    """At the smallest width that a training config allows."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        unet = build_unet(4, 8, (64, 64), 1, (True, False), 16, WIDTH)
    told, changes = latents_and_text(tiny_clip().encode(PROMPTS).states, 4)
    sees(output_of(unet.eval()), told, changes)


@torch.no_grad()
@pytest.mark.parametrize("tower", TOWERS)
def test_a_text_tower(tower: str) -> None:
    """Each token moves the state of its place and that of the last; what is hidden moves none."""
    text = TOWERS[tower]()
    tokens = text.tokenize(["a red heart with an arrow and the face of a sad dog"])
    assert bool(tokens.mask.all())
    whole = text.states(tokens).states
    for place in range(WINDOW):
        ids = tokens.ids.clone()
        ids[:, place] = (ids[:, place] + 7) % 30
        states = text.model(input_ids=ids).last_hidden_state
        for at in (place, WINDOW - 1):
            assert moved(whole[:, at], states[:, at]) > ENOUGH, (place, at)


@torch.no_grad()
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_autoencoder(kind: Literal["kl", "vq"], statistics: str) -> None:
    """Gain and offset between its own latents and those of a network matter to the decoder."""
    vae: Any = tiny_vae(kind, statistics)

    def encode(pictures: Tensor) -> tuple[Tensor, ...]:
        encoded = vae.encode(pictures)
        if kind == "vq":
            return encoded.latents.split(1, dim=1)
        return *encoded.latent_dist.mean.split(1, dim=1), encoded.latent_dist.logvar

    def decode(z: Tensor) -> tuple[Tensor, ...]:
        return vae.decode(z).sample.split(1, dim=1)

    pictures = noise(2, 3, 16, 16).clamp(-1, 1)
    colours = {f"colour {c}": {"pictures": other(pictures, slice(None), c)} for c in range(3)}
    sees(encode, {"pictures": pictures}, colours)
    z = torch.cat(encode(pictures)[:4], 1)
    said = STATISTICS[statistics]
    gain = torch.tensor(said.get("latents_std", 1.0)).view(1, -1, 1, 1) / said["scaling_factor"]
    mean = said.get("latents_mean", said.get("shift_factor", 0.0))
    offset = torch.tensor(mean).view(1, -1, 1, 1)
    latents = (z - offset) / gain
    changes = {f"channel {c}": other(z, slice(None), c) for c in range(4)}
    changes |= {"no gain": latents + offset, "exchanged": latents * offset + gain}
    if statistics != "scale":
        changes["no offset"] = latents * gain
    sees(decode, {"z": z}, {name: {"z": value} for name, value in changes.items()})


@torch.no_grad()
def test_what_guides_score_with() -> None:
    classifier, clip = tiny_classifier().network, tiny_clip_of_pictures()
    x, log_snr = noise(8, 4, 8, 8), torch.zeros(8)
    changes: dict[str, Any] = {f"channel {c}": {"x": other(x, slice(None), c)} for c in range(4)}
    changes |= {f"log-SNR {v}": {"log_snr": torch.full((8,), v)} for v in (-8.0, -1.0, 1.0, 8.0)}
    sees(lambda x, log_snr: [classifier(x, log_snr)], {"x": x, "log_snr": log_snr}, changes)
    pictures = noise(8, 3, 12, 12).clamp(-1, 1)
    changes = {f"colour {c}": {"pictures": other(pictures, slice(None), c)} for c in range(3)}
    sees(lambda pictures: [clip.pictures(pictures)], {"pictures": pictures}, changes)
    texts = clip.texts(["a red heart", "a blue heart", "a red square"])
    for one, another in ((0, 1), (0, 2), (1, 2)):
        assert moved(texts[one], texts[another]) > ENOUGH
