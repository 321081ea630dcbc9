"""Inpainting and InstructPix2Pix models: what they see, what stays, two scales, clear refusals."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_bundle, unet_of, vae_of
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from latentdiff import (
    ILVR,
    Inpaint,
    Instruct,
    LatentDiffusionPipeline,
    RePaint,
    SDEdit,
    UserError,
    pictures,
    solvers,
)
from latentdiff.bundle import Bundle
from latentdiff.diffusion import process
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import conditioned_denoiser
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.editing.masks import inpainting_channels, masked_picture
from latentdiff.guidance import classifier_free, methods

CHANNELS = {"text-to-image": 4, "inpainting": 9, "instruct-pix2pix": 8}


@pytest.fixture(scope="module")
def pipes() -> dict[str, LatentDiffusionPipeline]:
    return {
        kind: LatentDiffusionPipeline(tiny_bundle(in_channels=channels))
        for kind, channels in CHANNELS.items()
    }


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def half(width: int = 16, height: int = 16) -> Image.Image:
    """White on the right."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def drawn(
    pipe: LatentDiffusionPipeline,
    *edits: Edit | str,
    solver: str = "ddim",
    scale: float = 4.0,
) -> np.ndarray:
    output = pipe(
        "a red heart",
        edits=edits,
        num_inference_steps=3,
        solver=solver,
        guidance_scale=scale,
        seed=5,
        progress=False,
    )
    return np.asarray(output.images[0])


def test_what_an_inpainting_network_sees() -> None:
    """The first pixel of a latent decides; 0.5 is hole; the mask comes first."""
    mask = torch.tensor([[0.0, 1.0, 0.5, 0.0], [1, 1, 0, 0], [0.49, 1, 1, 0], [1, 1, 0, 0]])
    latents = torch.arange(16.0).reshape(2, 2, 2, 2)
    seen = inpainting_channels(mask[None, None], latents)
    assert torch.equal(seen[:, :1], torch.tensor([[0.0, 1], [0, 1]]).expand(2, 1, 2, 2))
    assert torch.equal(seen[:, 1:], latents)
    small = seen[:1, :1]  # a mask of latents stays
    assert torch.equal(inpainting_channels(small, latents), seen)
    given = torch.full((1, 3, 4, 4), 0.7)
    assert torch.equal(masked_picture(given, mask[None, None])[0, 0] == 0, mask >= 0.5)


def watched(layer: nn.Module) -> tuple[list[Tensor], RemovableHandle]:
    """Record the inputs of a layer from now on."""
    batches: list[Tensor] = []

    def watch(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        batches.append(given[0])

    return batches, layer.register_forward_pre_hook(watch)


def test_the_network_is_given_just_that(pipes: dict[str, LatentDiffusionPipeline]) -> None:
    """Masked latents scaled, those of InstructPix2Pix as the encoder gives them; both padded."""
    image, mask = picture(13, 15), half(13, 15)
    for kind, edit in (("inpainting", Inpaint(image, mask)), ("instruct-pix2pix", Instruct(image))):
        bundle = pipes[kind].bundle
        batches, hook = watched(unet_of(bundle).conv_in)
        drawn(pipes[kind], edit, scale=4.0 if kind == "inpainting" else 1.0)
        hook.remove()
        pixels = pictures.to_tensor(image)[None]
        if kind == "inpainting":
            pixels = pixels.where(torch.from_numpy(np.array(mask)) == 0, 0.0)
        padded = torch.nn.functional.pad(pixels, (0, 1, 0, 1), mode="replicate")
        encoded = vae_of(bundle).encode(padded).latent_dist.mode()
        if kind == "inpainting":
            assert [tuple(batch.shape) for batch in batches] == [(2, 9, 8, 7)] * 3
            for row in batches[1]:
                torch.testing.assert_close(row[5:], encoded[0] * 0.7)
                assert (row[4] == (torch.arange(7) >= 3)).all()
        else:  # three in one batch: the negative without and with the picture, the positive
            assert [tuple(batch.shape) for batch in batches] == [(3, 8, 8, 7)] * 3
            shown = [bool(row[4:].any()) for row in batches[1]]
            assert sorted(shown) == [False, True, True]
            for row, is_shown in zip(batches[1], shown, strict=True):
                if is_shown:
                    torch.testing.assert_close(row[4:], encoded[0])


def test_known_pixels_are_bit_identical(pipes: dict[str, LatentDiffusionPipeline]) -> None:
    """Alone and with the other edits, random sizes, soft masks."""
    for case in range(6):
        random = np.random.default_rng(case)
        width, height = random.integers((1, 5), 24).tolist()
        image = picture(width, height, case)
        grey = random.integers(0, 256, (height, width)) * (random.random((height, width)) < 0.5)
        mask = Image.fromarray(grey.astype(np.uint8))
        others = [[], [SDEdit(image, 0.7)], [RePaint(image, mask, resamples=2)], [ILVR(image)]]
        solver = ("ddim", "euler-a", "dpmpp-2m")[case % 3]
        result = drawn(pipes["inpainting"], *others[case % 4], Inpaint(image, mask), solver=solver)
        assert result.shape == (height, width, 3)
        assert (result == np.asarray(image))[grey == 0].all()
    image = picture()
    black, white = Image.new("L", (16, 16), 0), Image.new("L", (16, 16), 255)
    assert (drawn(pipes["inpainting"], Inpaint(image, black)) == np.asarray(image)).all()
    hidden = [drawn(pipes["inpainting"], Inpaint(picture(seed=s), white)) for s in (0, 1)]
    assert (hidden[0] == hidden[1]).all()  # nothing of the picture is seen in its hole


@pytest.mark.parametrize(
    "solver",
    ["heun", *(pytest.param(n, marks=pytest.mark.slow) for n in solvers.names() if n != "heun")],
)
def test_they_go_with_every_solver_and_with_guides(
    solver: str, pipes: dict[str, LatentDiffusionPipeline]
) -> None:
    """The picture is kept and used; a spoilt attention is spoilt while it sees the picture."""
    image, mask = picture(), half()
    known = np.asarray(mask) == 0
    runs: list[tuple[str, list[Edit]]] = [
        ("inpainting", [Inpaint(image, mask)]),
        (
            "inpainting",
            [SDEdit(image, 0.7), RePaint(image, mask, resamples=2), Inpaint(image, mask)],
        ),
        ("instruct-pix2pix", [Instruct(image)]),
        ("instruct-pix2pix", [SDEdit(image, 0.7, mask=mask), Instruct(image)]),
    ]
    for kind, edits in runs:
        plain = drawn(pipes[kind], *edits, solver=solver)
        steered = drawn(pipes[kind], "pag:3", *edits, solver=solver)
        assert (plain != steered).any()
        for result in (plain, steered) if kind == "inpainting" or len(edits) > 1 else ():
            assert (result == np.asarray(image))[known].all()


def test_latents_in_place_of_pictures(pipes: dict[str, LatentDiffusionPipeline]) -> None:
    """Complete with latents: the same run but for pasting."""
    bundle, image = pipes["inpainting"].bundle, picture()
    white = Image.new("L", (16, 16), 255)
    encoded = bundle.autoencoder.encode(torch.zeros(1, 3, 16, 16))
    on_latents = Inpaint(encoded, torch.ones(1, 1, 8, 8))
    assert (
        drawn(pipes["inpainting"], on_latents) == drawn(pipes["inpainting"], Inpaint(image, white))
    ).all()
    raw = bundle.autoencoder.encode(pictures.to_tensor(image)[None]) / 0.7
    pipe = pipes["instruct-pix2pix"]
    assert (drawn(pipe, Instruct(raw)) == drawn(pipe, Instruct(image))).all()


X = NoiseStreams(0, count=2).draw((4, 4, 4))


def seeing_network(
    x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
) -> Tensor:
    """Not linear in anything; it sees the picture."""
    assert condition.states is not None
    assert condition.beside is not None
    return torch.tanh(x + condition.states.mean((1, 2))[:, None, None, None] * condition.beside)


def conditions() -> list[Condition]:
    """Positive, negative, and negative without the picture."""
    states = [torch.full((2, 5, 3), value) for value in (0.7, -0.3, -0.3)]
    beside = [torch.full((2, 4, 4, 4), value) for value in (1.0, 1.0, 0.0)]
    return [Condition(states=s, beside=b) for s, b in zip(states, beside, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_two_scales_are_equation_3(scale: float, image_scale: float) -> None:
    """Brooks et al. 2023 in eps, though guidance is of x_0; the network is asked once."""
    vp, batches = process.create("vp-linear"), list[int]()

    def network(x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]) -> Tensor:
        batches.append(len(x))
        return seeing_network(x, t, condition)

    level = vp.level(400)
    positive, negative, blind = conditions()
    x0 = classifier_free(
        conditioned_denoiser(network, vp, "eps"),
        positive,
        negative,
        scale=scale,
        blind=blind,
        image_scale=image_scale,
    )(X, level).x0
    both, picture_alone, neither = (
        seeing_network(X, torch.zeros(2), each) for each in (positive, negative, blind)
    )
    eps = neither + image_scale * (picture_alone - neither) + scale * (both - picture_alone)
    torch.testing.assert_close(x0, (X - level.sigma * eps) / level.alpha)
    asked = {(1.0, 1.0): 2, (7.5, 1.0): 4}.get((scale, image_scale), 6)
    assert batches == [asked]


def test_scales_that_cannot_be() -> None:
    positive, negative, blind = conditions()
    denoise = conditioned_denoiser(seeing_network, process.create("vp-linear"), "eps")
    with pytest.raises(UserError, match="finite"):
        classifier_free(denoise, positive, negative, scale=2, blind=blind, image_scale=math.nan)
    with pytest.raises(UserError, match="finite number, not inf"):
        Instruct(picture(), math.inf)
    with pytest.raises(UserError, match="no image guidance; 'cfg' does"):
        methods.create(
            "apg", denoise, positive, negative, [], scale=2, blind=blind, image_scale=1.5
        )


INPAINT, INSTRUCT = Inpaint(picture(), half()), Instruct(picture())
REFUSED: list[tuple[str, list[Edit], str]] = [
    ("text-to-image", [INPAINT], "takes 4 channels, not 9: .* RePaint or Blend"),
    ("text-to-image", [INSTRUCT], "takes 4 channels, not 8: .* SDEdit"),
    ("inpainting", [], "takes 9 channels, not 4: .* an inpainting model: it needs edits="),
    ("inpainting", [RePaint(picture(), half())], r"needs edits=\[Inpaint\(image, mask\)\]"),
    ("inpainting", [INSTRUCT], "takes 9 channels, not 8: .* inpainting model"),
    ("instruct-pix2pix", [], r"takes 8 channels, not 4: .* edits=\[Instruct\(image\)\]"),
    ("instruct-pix2pix", [INPAINT], "takes 8 channels, not 9"),
    ("inpainting", [INPAINT, INPAINT], "one Inpaint, Instruct or Enlarge"),
]


@pytest.mark.parametrize(("kind", "edits", "expected"), REFUSED)
def test_the_wrong_edit_is_one_clear_line(
    kind: str, edits: list[Edit], expected: str, pipes: dict[str, LatentDiffusionPipeline]
) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        drawn(pipes[kind], *edits)
    assert "\n" not in str(caught.value)


def test_inversion_says_so_too(pipes: dict[str, LatentDiffusionPipeline]) -> None:
    with pytest.raises(UserError, match="InstructPix2Pix model"):
        pipes["instruct-pix2pix"].invert(picture(), "a cat")


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_saved_model_comes_back(
    kind: str, pipes: dict[str, LatentDiffusionPipeline], tmp_path: Path
) -> None:
    """A latent mean is folded into the autoencoder, and what the U-Net is shown stays the same."""
    statistics = "scale" if kind == "instruct-pix2pix" else "channels"  # it refuses a mean
    bundle = tiny_bundle(in_channels=CHANNELS[kind], statistics=statistics)
    again = Bundle.load(bundle.save(tmp_path / "model"))
    assert (again.kind, again.latent_channels) == (kind, 4)
    edits: dict[str, list[Edit]] = {"inpainting": [INPAINT], "instruct-pix2pix": [INSTRUCT]}
    one, other = (
        drawn(LatentDiffusionPipeline(each), *edits.get(kind, [])).astype(int)
        for each in (bundle, again)
    )
    assert np.abs(one - other).max() <= 1  # of 255
