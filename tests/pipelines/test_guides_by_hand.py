"""Guidances and edits through the pipeline against the U-Net called by hand, step by step."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, tower_of, unet_of
from torch import Tensor

from latentdiff import PAG, SEG, Autoguidance, LatentDiffusionPipeline, UserError
from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Denoiser, Estimate
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.guidance import DynamicThresholding

BUNDLE = tiny_bundle()
# A worse version: other weights, another text encoder, another prediction; the same latents.
WEAK = tiny_bundle(seed=1, tower="t5", prediction="eps")
PROMPTS = ["a red heart", "a sad dog"]
STEPS = 4
LEVELS = BUNDLE.timetable(None, STEPS)
RATIOS = [level.ratio for level in LEVELS]
INTERVAL = (RATIOS[3], RATIOS[1])  # steps 1 and 2 of 0..3 are inside


def draw(*edits: Edit | str, **arguments: Any) -> Tensor:
    """Latents of the two prompts [2, 4, 8, 8], by DDIM."""
    settings: dict[str, Any] = {"solver": "ddim", "num_inference_steps": STEPS, "seed": 0}
    settings |= {"prompt": PROMPTS, "output_type": "latent", "progress": False, "edits": edits}
    return LatentDiffusionPipeline(BUNDLE)(**settings | arguments).images


@torch.no_grad()
def said(bundle: Bundle, texts: Sequence[str], x: Tensor, level: NoiseLevel) -> Tensor:
    """x_0 of a model under these texts, by its U-Net alone."""
    text = tower_of(bundle).encode(list(texts))
    t = torch.full((len(x),), level.t)
    output = unet_of(bundle)(
        x, t, encoder_hidden_states=text.states, encoder_attention_mask=text.mask
    ).sample
    if bundle.prediction == "v":
        return level.alpha * x - level.sigma * output
    return (x - level.sigma * output) / level.alpha


def cfg(x: Tensor, level: NoiseLevel, scale: float = 4.0) -> Tensor:
    positive, negative = said(BUNDLE, PROMPTS, x, level), said(BUNDLE, ["", ""], x, level)
    return negative + scale * (positive - negative)


def by_hand(x0_of: Callable[[Tensor, NoiseLevel], Tensor]) -> Tensor:
    """DDIM from the pipeline's own noise: alpha' x_0 + sigma' (x - alpha x_0) / sigma."""
    x = NoiseStreams(0, count=2).draw((4, 8, 8))
    for here, there in pairwise(LEVELS):
        x0 = x0_of(x, here)
        x = there.alpha * x0 + there.sigma * (x - here.alpha * x0) / here.sigma
    return x


def clipped(x0: Tensor, quantile: float, at_least: float) -> Tensor:
    """Saharia et al. 2022, picture by picture, in NumPy."""
    pictures: list[Tensor] = []
    for picture in x0:
        values = picture.numpy()
        s = max(at_least, float(np.quantile(np.abs(values), quantile)))
        pictures.append(torch.from_numpy(np.clip(values, -s, s) * (at_least / s)))
    return torch.stack(pictures)


def close(got: Tensor, expected: Tensor, other: Tensor) -> None:
    """Equal to what is expected, which is something else than the run without."""
    assert (got - expected).abs().max() < 2e-5
    assert (expected - other).abs().max() > 2e-3


def test_the_hand_is_right_about_plain_guidance() -> None:
    close(draw(), by_hand(cfg), draw(guidance_scale=1))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_autoguidance_is_the_formula(scale: float) -> None:
    """weak + 2.5 (guided - weak), the weak model asked under the prompts in its own words."""

    def x0_of(x: Tensor, level: NoiseLevel) -> Tensor:
        weak = said(WEAK, PROMPTS, x, level)
        return weak + 2.5 * (cfg(x, level, scale) - weak)

    plain = draw(guidance_scale=scale)
    close(draw(Autoguidance(WEAK, 2.5), guidance_scale=scale), by_hand(x0_of), plain)
    assert torch.equal(draw(Autoguidance(WEAK, 1.0), guidance_scale=scale), plain)


def test_autoguidance_follows_each_picture_of_a_batch() -> None:
    together = draw(Autoguidance(WEAK, 2.5), num_images_per_prompt=2)
    alone = draw(Autoguidance(WEAK, 2.5), prompt=PROMPTS[1], first=3)
    assert (alone[0] - together[3]).abs().max() < 1e-4


def test_thresholding_is_the_formula() -> None:
    def x0_of(x: Tensor, level: NoiseLevel) -> Tensor:
        return clipped(cfg(x, level), 0.8, 0.9)

    got = draw(DynamicThresholding(0.8, 0.9))
    close(got, by_hand(x0_of), draw())
    assert got.abs().max() <= 0.9 + 1e-6  # DDIM ends at its last estimate
    assert torch.equal(draw(DynamicThresholding(1.0, 1e6)), draw())


@pytest.mark.parametrize("threshold_first", [True, False])
def test_edits_of_the_estimate_act_in_their_order(threshold_first: bool) -> None:
    def x0_of(x: Tensor, level: NoiseLevel) -> Tensor:
        guided, weak = cfg(x, level), said(WEAK, PROMPTS, x, level)
        if threshold_first:
            return weak + 2.0 * (clipped(guided, 0.8, 0.9) - weak)
        return clipped(weak + 2.0 * (guided - weak), 0.8, 0.9)

    edits = [DynamicThresholding(0.8, 0.9), Autoguidance(WEAK, 2.0)]
    got, other = draw(*edits), draw(*edits[::-1])
    if not threshold_first:
        got, other = other, got
    close(got, by_hand(x0_of), other)


@pytest.mark.parametrize("name", ["cfg", "apg", "cfg++"])
def test_the_interval_holds_for_every_method(name: str) -> None:
    """Outside it the prompt is alone; CFG++ keeps the negative condition's noise only inside."""
    scale = 0.55 if name == "cfg++" else 4.0
    x = NoiseStreams(0, count=2).draw((4, 8, 8))
    for place, (here, there) in enumerate(pairwise(LEVELS)):
        positive, negative = said(BUNDLE, PROMPTS, x, here), said(BUNDLE, ["", ""], x, here)
        x0, kept = positive, positive
        if place in (1, 2):
            x0 = negative + scale * (positive - negative)
            kept = negative if name == "cfg++" else x0
        if place in (1, 2) and name == "apg":
            change = positive - negative
            along = (change * positive).sum((1, 2, 3), keepdim=True) * positive
            along = along / positive.square().sum((1, 2, 3), keepdim=True)
            x0 = kept = positive + 3.0 * (change - along)
        x = there.alpha * x0 + there.sigma * (x - here.alpha * kept) / here.sigma
    settings: dict[str, Any] = {"guidance": name, "guidance_scale": scale}
    got = draw(guidance_interval=INTERVAL, **settings)
    close(got, x, draw(**settings))
    close(got, x, draw(guidance_scale=1))


def alone(
    denoise: ConditionedDenoiser, positive: Condition, negative: Condition, /, *, scale: float
) -> Denoiser:
    """A method of one's own that asks the positive condition and nothing else."""
    branches = [Branch("positive", positive)]

    def half(x: Tensor, level: NoiseLevel) -> Estimate:
        (estimate,) = denoise(x, level, branches)
        return estimate.with_x0(scale * estimate.x0)

    return half


ALSO = ["a slice:0.7", ("a blue square", -0.4)]


def with_further(x: Tensor, level: NoiseLevel) -> Tensor:
    """The prompt and what the further ones add, each from the negative condition."""
    negative, total = said(BUNDLE, ["", ""], x, level), said(BUNDLE, PROMPTS, x, level)
    for text, weight in (("a slice", 0.7), ("a blue square", -0.4)):
        total = total + weight * (said(BUNDLE, [text, text], x, level) - negative)
    return total


def test_further_prompts_act_with_guidance_off() -> None:
    got = draw(also=ALSO, guidance_scale=1)
    close(got, by_hand(with_further), draw(guidance_scale=1))
    run = LatentDiffusionPipeline(BUNDLE)(
        PROMPTS, also=ALSO, guidance_scale=1, num_inference_steps=3, progress=False
    )
    assert run.nfe == 3  # still one batch a step


def test_further_prompts_act_outside_the_interval() -> None:
    def x0_of(x: Tensor, level: NoiseLevel) -> Tensor:
        composed = with_further(x, level)
        if not INTERVAL[0] < level.ratio <= INTERVAL[1]:
            return composed
        negative = said(BUNDLE, ["", ""], x, level)
        return negative + 3.0 * (composed - negative)

    settings: dict[str, Any] = {"guidance_scale": 3.0, "guidance_interval": INTERVAL}
    close(draw(also=ALSO, **settings), by_hand(x0_of), draw(**settings))
    never = draw(also=ALSO, guidance_scale=3.0, guidance_interval=(1e6, 1e7))
    close(never, by_hand(with_further), draw(guidance_scale=1))


def test_further_prompts_act_with_a_method_that_asks_only_the_positive_condition() -> None:
    def x0_of(x: Tensor, level: NoiseLevel) -> Tensor:
        return 0.8 * with_further(x, level)

    settings: dict[str, Any] = {"guidance": alone, "guidance_scale": 0.8}
    close(draw(also=ALSO, **settings), by_hand(x0_of), draw(**settings))


def test_further_prompts_are_from_the_negative_prompt_that_was_given() -> None:
    """Also where guidance, which is what a negative prompt is for elsewhere, is off."""

    def x0_of(x: Tensor, level: NoiseLevel) -> Tensor:
        away, hat = (said(BUNDLE, [text] * 2, x, level) for text in ("a dog", "a blue square"))
        return said(BUNDLE, PROMPTS, x, level) + 0.9 * (hat - away)

    settings: dict[str, Any] = {"also": [("a blue square", 0.9)], "guidance_scale": 1}
    close(draw(negative_prompt="a dog", **settings), by_hand(x0_of), draw(**settings))


def test_guides_in_words_are_the_values(tmp_path: Path) -> None:
    folder = WEAK.save(tmp_path / "weak:er model")
    pairs: list[tuple[str, Edit]] = [
        ("threshold:0.8", DynamicThresholding(0.8)),
        (
            f"autoguidance:2.5:{folder}",
            Autoguidance(Bundle.load(folder, device="cpu", engine="auto"), 2.5),
        ),
        ("pag:2", PAG(2.0)),
        ("seg:1.5", SEG(1.5)),
    ]
    large: dict[str, Any] = {"guidance_scale": 30.0}  # so that latents leave the bound of 3
    for text, value in pairs:
        got = draw(text, **large)
        assert torch.equal(got, draw(value, **large)), text
        assert (got - draw(**large)).abs().max() > 1e-3, text
    texts, values = zip(*pairs, strict=True)
    assert torch.equal(draw(*texts, **large), draw(*values, **large))
    assert torch.equal(draw(texts[0], values[1], **large), draw(values[0], texts[1], **large))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("threshold", "a guide reads pag:SCALE"),
        ("threshold:x", "a guide reads pag:SCALE"),
        ("threshold:0.9:3", "a guide reads pag:SCALE"),
        ("threshold:0", "quantile within 0..1"),
        ("threshold:1.5", "quantile within 0..1"),
        ("treshold:0.9", "did you mean 'threshold'"),
        ("autoguidance:2", "a guide reads pag:SCALE"),
        ("autoguidance:nan:x", "a guide reads pag:SCALE"),
        ("autoguidance:2:", "a guide reads pag:SCALE"),
        ("autoguidance:2:/no/such/folder", "no/such/folder"),
    ],
)
def test_guides_in_words_that_do_not_read_are_told(text: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        draw(text)
    assert "\n" not in str(caught.value)


def test_the_command_line_takes_them_and_an_interval(tmp_path: Path) -> None:
    """Each picture is that of the pipeline with the same settings, to the last bit."""
    strong, weak = BUNDLE.save(tmp_path / "strong"), WEAK.save(tmp_path / "weak")
    low, high = (f"{ratio:.4f}" for ratio in (RATIOS[3] - 0.01, RATIOS[1] + 0.01))
    pipe = LatentDiffusionPipeline.from_pretrained(strong, device="cpu")
    guides = ["threshold:0.8", f"autoguidance:2.5:{weak}"]
    seen: list[np.ndarray] = []
    for name, scale in (("cfg", 4.0), ("apg", 4.0), ("cfg++", 0.55)):
        out = tmp_path / name
        command = ["generate", PROMPTS[0], "--model", str(strong), "--out", str(out)]
        command += ["--guidance", name, "--guidance-scale", str(scale), "--device", "cpu"]
        command += ["--interval", f"{low},{high}", "--steps", str(STEPS), "--seed", "0"]
        for guide in guides:
            command += ["--guide", guide]
        assert main([*command, "--solver", "ddim"]) == 0
        (drawn,) = out.glob("*.png")
        expected = pipe(
            PROMPTS[0],
            guidance=name,
            guidance_scale=scale,
            guidance_interval=(float(low), float(high)),
            edits=guides,
            solver="ddim",
            num_inference_steps=STEPS,
            seed=0,
            progress=False,
        ).images[0]
        seen.append(np.asarray(Image.open(drawn)))
        assert (seen[-1] == np.asarray(expected)).all()
    assert all((one != seen[0]).any() for one in seen[1:])


def test_models_that_cannot_guide_each_other_are_told() -> None:
    for scale in (math.nan, math.inf):
        with pytest.raises(UserError, match="autoguidance: scale: must be a finite number"):
            Autoguidance(WEAK, scale)
    with pytest.raises(UserError, match="needs a text-to-image model, not inpainting"):
        Autoguidance(tiny_bundle(in_channels=9))
    with pytest.raises(UserError, match="was trained on another process"):
        draw(Autoguidance(tiny_bundle(process="flow")))
    with pytest.raises(UserError, match="run it in the pipeline"):
        Autoguidance(WEAK).denoiser(lambda x, level: Estimate(x))
