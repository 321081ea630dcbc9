"""`Enlarge`: both moments of a linear-Gaussian model, what is held, sizes, windows, the command."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny import WIDTH, tiny_bundle, tiny_clip, tiny_upscaler
from torch import Tensor, nn

from latentdiff import Enlarge, LatentDiffusionPipeline, SDEdit, TiledDiffusion, UserError
from latentdiff.bundle import Bundle, Steps
from latentdiff.cli import main
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.process import Process
from latentdiff.editing.enlarge import as_large_as
from latentdiff.editing.lowpass import agreeing, lanczos_inverse, lanczos_matrix
from latentdiff.metrics.psnr import psnr
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.haar import HaarTransform, PixelAutoencoder
from latentdiff.models.network import Kind, LowResolution
from latentdiff.pictures import to_tensor

FINE = 0.1  # deviation of what is in the small picture and not in the large one
SIZE = 12  # numbers of the small picture of 2 x 2; the large one has 48


@dataclass(frozen=True, eq=False)
class LinearUpscaler:
    """E[x_0 | x_t, y_s] of x_0 ~ N(mean, S) and y = A x_0 + n in closed form, as a `Network`.

    The latents are Haar coefficients of 4 x 4 pictures, and A takes the means of 2 x 2 pixels.
    """

    process: Process
    made: LowResolution
    native_size: tuple[int, int] = (2, 2)
    channels: int = 12
    in_channels: int = 15
    learns_variance: bool = False
    kind: Kind = "upscaling"
    part: str = "unet"
    width: int = WIDTH
    guidance_width: int | None = None
    noise_width: int | None = None
    multiple: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    module: nn.Module = field(default_factory=nn.Identity)

    @property
    def low_resolution(self) -> LowResolution:
        return self.made

    @property
    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean [48] and covariance [48, 48] of the data, which has no symmetry."""
        random = torch.Generator().manual_seed(1)
        mixing = torch.randn(48, 48, generator=random, dtype=torch.float64) / 48**0.5
        covariance = 0.5 * mixing @ mixing.T + 0.05 * torch.eye(48, dtype=torch.float64)
        return torch.randn(48, generator=random, dtype=torch.float64) / 4, covariance

    @property
    def shrinking(self) -> Tensor:
        """A [12, 48]: the first band of a block is the sum of its four pixels, halved."""
        return torch.eye(48, dtype=torch.float64)[:SIZE] / 2

    def posterior(self, y_s: Tensor, alpha_s: float, sigma_s: float) -> tuple[Tensor, Tensor]:
        """Precision [48, 48], and precision times mean [B, 48], given y_s [B, 12]."""
        mean, covariance = self.prior
        spread = (alpha_s * FINE) ** 2 + sigma_s**2
        seen = alpha_s * self.shrinking
        precision = torch.linalg.inv(covariance)
        pull = precision @ mean + y_s @ seen / spread
        return precision + seen.T @ seen / spread, pull

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int] = ()
    ) -> Tensor:
        assert condition.beside is not None
        assert condition.noise_level is not None
        (level,) = set(condition.noise_level.tolist())
        low = self.made.process.level(level)
        here = self.process.level(float(t[0]))
        scale = self.process.input_scale(here.alpha, here.sigma)
        y_s = condition.beside.double().flatten(1)
        precision, pull = self.posterior(y_s, low.alpha, low.sigma)
        precision = precision + (here.alpha / here.sigma) ** 2 * torch.eye(48, dtype=torch.float64)
        pull = pull + here.alpha / here.sigma**2 * x.double().flatten(1) / scale
        return torch.linalg.solve(precision, pull.T).T.view(x.shape).to(x)

    def perturbable(self, perturbations: Sequence[Any]) -> Self:
        return self

    def with_module(self, module: nn.Module) -> Self:
        return self


def linear_model(process: str = "vp-linear", noising: str = "vp-linear") -> Bundle:
    made = LowResolution(processes.create(noising), 999, 2)
    known = processes.create(process)
    return Bundle(
        PixelAutoencoder(HaarTransform({"levels": 1}).requires_grad_(False)),
        TextConditioner(tiny_clip()),
        LinearUpscaler(known, made),
        known,
        "x0",
        Steps("trailing"),
    )


def small_picture() -> Tensor:
    return torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(2)) - 0.3


def network_of(bundle: Bundle) -> LinearUpscaler:
    assert isinstance(bundle.network, LinearUpscaler)
    return bundle.network


def drawn(bundle: Bundle, level: int, seeds: list[int], **settings: Any) -> Tensor:
    """Latents [B, 48], float64, of pictures that agree with y by the model alone."""
    options = {"num_images_per_prompt": len(seeds), "guidance_scale": 1.0, "progress": False}
    edits = [Enlarge(small_picture(), level, hold=False)]
    pipe = LatentDiffusionPipeline(bundle)
    out = pipe("", edits=edits, seed=seeds, output_type="latent", **options, **settings)
    return out.latents.double().flatten(1)


@pytest.mark.parametrize("level", [0, 80])
@pytest.mark.parametrize(
    ("process", "solver", "steps", "enough"),
    [
        ("flow", "heun", 200, 5e-4),
        ("flow", "dpmpp-2m", 200, 5e-4),
        ("flow", "ddim", 400, 1e-2),
        ("vp-cosine", "dpmpp-2m", 200, 5e-3),
        ("vp-linear", "heun", 100, 6e-3),  # at its noisiest level 0.6 % of the data are left
    ],
)
def test_both_moments_of_a_linear_gaussian_model(
    process: str, solver: str, steps: int, enough: float, level: int
) -> None:
    """What a solver makes of noise is affine here, so no sampling is needed: from no noise comes
    the mean, and what each number of the noise adds has the covariance, given one noise in y."""
    bundle = linear_model(process)
    network = network_of(bundle)
    basis = torch.cat([torch.zeros(1, 48), torch.eye(48)]).view(-1, 12, 2, 2)
    settings = {"solver": solver, "num_inference_steps": steps}
    found = drawn(bundle, level, [7] * 49, latents=basis, **settings)
    low = network.made.process.level(level)
    eps = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(7))
    y_s = low.alpha * small_picture() + low.sigma * eps
    precision, pull = network.posterior(y_s.double().flatten(1), low.alpha, low.sigma)
    covariance = torch.linalg.inv(precision)
    assert (found[0] - covariance @ pull[0]).abs().max() < enough
    ways = found[1:] - found[0]
    assert (ways.T @ ways - covariance).abs().max() < enough * covariance.diagonal().max()
    prior_mean, prior = network.prior  # or the picture would not matter
    assert (covariance @ pull[0] - prior_mean).abs().max() > 0.1
    assert (covariance.diagonal() / prior.diagonal()).min() < 0.6


@pytest.mark.parametrize("solver", ["dpmpp-2m", "dpmpp-2m-sde"])
def test_the_moments_over_the_noise_in_the_small_picture(solver: str) -> None:
    """With conditioning augmentation the mean is linear in y_s, so over eps, too, both moments are
    known: by 3,000 pictures, within five standard errors."""
    bundle, level, count = linear_model(), 80, 3000
    network = network_of(bundle)
    found = drawn(bundle, level, list(range(count)), solver=solver, num_inference_steps=60)
    low = network.made.process.level(level)
    y = low.alpha * small_picture().double().flatten(1)
    precision, pull = network.posterior(y, low.alpha, low.sigma)
    covariance = torch.linalg.inv(precision)
    spread = (low.alpha * FINE) ** 2 + low.sigma**2
    gain = covariance @ (low.alpha * network.shrinking).T / spread
    whole = covariance + low.sigma**2 * gain @ gain.T
    error = (found.mean(0) - covariance @ pull[0]) / (whole.diagonal() / count).sqrt()
    assert error.abs().max() < 5
    variance = found.var(0) / whole.diagonal()
    assert (variance - 1).abs().max() < 5 * (2 / count) ** 0.5
    assert (whole.diagonal() / covariance.diagonal()).max() > 1.5  # or eps would not matter


@pytest.mark.parametrize(("before", "after"), [(40, 20), (37, 12), (16, 16), (9, 2)])
def test_the_filter_is_pillows(before: int, after: int) -> None:
    pixels = np.random.default_rng(0).random((before, before + 3), dtype=np.float32)
    size = after + 1, after
    wanted = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    rows, columns = lanczos_matrix(before, after), lanczos_matrix(before + 3, after + 1)
    assert np.abs(rows @ pixels @ columns.T - wanted).max() < 1e-5


def test_what_agrees_is_the_nearest_that_does() -> None:
    random = torch.Generator().manual_seed(0)
    large = torch.randn(2, 3, 22, 15, generator=random, dtype=torch.float64)
    small = torch.randn(1, 3, 11, 6, generator=random, dtype=torch.float64)
    rows, columns = (torch.from_numpy(lanczos_matrix(*one)) for one in ((22, 11), (15, 6)))
    found = agreeing(large, small)
    assert (rows @ found @ columns.T - small).abs().max() < 1e-12
    assert (agreeing(found, small) - found).abs().max() < 1e-12
    # Any other that agrees differs by what shrinks to nothing, which is at right angles.
    other = agreeing(torch.randn(2, 3, 22, 15, generator=random, dtype=torch.float64), small)
    assert ((other - found) * (found - large)).sum((1, 2, 3)).abs().max() < 1e-9


@pytest.mark.parametrize(("before", "after"), [(257, 256), (40, 3), (9, 9), (30, 7)])
def test_the_way_back_is_the_pseudoinverse_and_few_are_kept(before: int, after: int) -> None:
    wanted = np.linalg.pinv(lanczos_matrix(before, after))
    assert np.abs(lanczos_inverse(before, after) - wanted).max() < 1e-14
    for matrices in (lanczos_matrix, lanczos_inverse):  # of a large picture each has 100 MB
        assert matrices.cache_info().maxsize == 8


def given(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def enlarged(bundle: Bundle, edit: Enlarge, *more: Any, **settings: Any) -> Tensor:
    settings = {"guidance_scale": 1.0, "num_inference_steps": 2, "seed": 3, **settings}
    pipe = LatentDiffusionPipeline(bundle)
    return pipe("", edits=[edit, *more], output_type="pt", progress=False, **settings).images


@pytest.mark.parametrize(("width", "height"), [(8, 8), (5, 11), (13, 7)])
def test_any_size_and_what_is_held(width: int, height: int) -> None:
    small = given(width, height)
    free = enlarged(tiny_upscaler(), Enlarge(small, hold=False))
    held = enlarged(tiny_upscaler(), Enlarge(small))
    assert free.shape == held.shape == (1, 3, 2 * height, 2 * width)
    wanted = agreeing(2 * free - 1, to_tensor(small)[None])
    # the first was clamped before, where it is beyond the range
    inside = ((free > 0) & (free < 1)).all(1).float().mean()
    assert inside > 0.2
    assert (held - (wanted / 2 + 0.5).clamp(0, 1)).abs().median() < 0.1
    assert (held - free).abs().max() > 0.05


def test_windows_see_their_part_of_the_small_picture() -> None:
    """Of a network that says of each place what it is shown there, windows are the whole."""

    @dataclass(frozen=True, eq=False)
    class Showing(LinearUpscaler):
        def __call__(self, x: Tensor, t: Tensor, condition: Condition, *_: Any) -> Tensor:
            assert x.shape[-2:] == (2, 2)
            assert condition.beside is not None
            return condition.beside.repeat(1, 4, 1, 1)

    bundle = linear_model()
    bundle = replace(bundle, network=Showing(bundle.process, network_of(bundle).made))
    small = torch.rand(1, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    latents = LatentDiffusionPipeline(bundle)(
        "",
        edits=[Enlarge(small, hold=False), TiledDiffusion(0.5)],
        guidance_scale=1.0,
        num_inference_steps=3,
        seed=0,
        output_type="latent",
        progress=False,
    ).latents
    low = network_of(bundle).made.process.level(0)
    shown = latents[:, :3]
    assert (shown - low.alpha * small).abs().max() < 6 * low.sigma
    assert torch.equal(latents, shown.repeat(1, 4, 1, 1))


def test_a_larger_ratio_than_the_factor_is_shown_as_sr3_shows_it() -> None:
    bundle = tiny_upscaler()
    network: Any = bundle.network
    wide = replace(bundle, network=replace(network, made=replace(network.made, ratio=4)))
    small = given(5, 4)
    drawn = enlarged(wide, Enlarge(small, hold=False))
    assert drawn.shape == (1, 3, 16, 20)
    assert as_large_as(to_tensor(small)[None], (8, 10)).shape == (1, 3, 8, 10)


def test_it_goes_with_a_start_from_a_picture() -> None:
    bundle, small = tiny_upscaler(), given(6, 6)
    start = small.resize((12, 12))
    kept = enlarged(bundle, Enlarge(small, hold=False), SDEdit(start, 0.0))
    assert (kept - (to_tensor(start) / 2 + 0.5)).abs().max() < 1e-6
    changed = enlarged(bundle, Enlarge(small, hold=False), SDEdit(start, 0.5))
    assert (changed - kept).abs().max() > 0.05


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: Enlarge(given(4, 4), -1), "at least 0"),
        (lambda: Enlarge(given(4, 4), 1.5), "whole number"),  # pyright: ignore
        (lambda: enlarged(tiny_upscaler(), Enlarge(given(4, 4), 351)), "trained up to 350"),
        (lambda: enlarged(tiny_bundle(), Enlarge(given(4, 4))), "enlarges no pictures"),
        (lambda: enlarged(tiny_upscaler(), Enlarge(given(4, 4)), height=16), "leave out height"),
        (
            lambda: enlarged(tiny_upscaler(), Enlarge(given(4, 4)), SDEdit(given(4, 4), 0.5)),
            "other edits pictures of that size",
        ),
        (
            lambda: LatentDiffusionPipeline(tiny_upscaler())("a cat", progress=False),
            r"needs edits=\[Enlarge",
        ),
        (lambda: LatentDiffusionPipeline(tiny_bundle())("", progress=False), "say what to draw"),
    ],
)
def test_what_does_not_fit_is_one_line(call: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        call()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_upscaler("waves").save(tmp_path_factory.mktemp("model") / "tiny")


def run(model: Path, out: Path, *arguments: str) -> Path:
    before = set(out.glob("*.png"))
    options = ["--model", str(model), "--out", str(out), "--steps", "2", "--seed", "5"]
    assert main(["enlarge", *arguments, *options]) == 0
    (path,) = set(out.glob("*.png")) - before
    return path


@pytest.mark.parametrize(
    ("factor", "size"), [("2", (26, 18)), ("1.5", (20, 14)), ("3", (39, 27)), ("4", (52, 36))]
)
def test_the_command(factor: str, size: tuple[int, int], model: Path, tmp_path: Path) -> None:
    """Once, twice where one ratio is too little, and by the very same windows as in Python."""
    given(13, 9).save(tmp_path / "given.png")
    path = run(model, tmp_path / "out", str(tmp_path / "given.png"), factor)
    with Image.open(path) as image:
        assert image.size == size
        about, pixels = json.loads(image.info["latentdiff"]), np.asarray(image)
    assert (about["edit"], about["factor"], about["picture"]) == (
        "Enlarge",
        float(factor),
        "given.png",
    )
    assert (about["noise_level"], about["hold"], about["guidance_scale"]) == (0, True, 1.0)
    if factor == "2":
        pipe = LatentDiffusionPipeline.from_pretrained(model, engine="eager")
        edits = [Enlarge(given(13, 9)), TiledDiffusion()]
        settings = {"guidance_scale": 1.0, "num_inference_steps": 2, "seed": 5, "progress": False}
        same = pipe("", edits=edits, **settings).images[0]
        assert np.abs(np.asarray(same).astype(int) - pixels).max() <= 1


def test_the_options_of_the_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "given.png"
    given(6, 6).save(file)
    plain = np.asarray(Image.open(run(model, tmp_path / "out", str(file), "2")))
    words = (["--prompt", "a red heart"], ["--negative", "a red heart"], ["--also", "a heart:0.5"])
    for option in (["--no-hold"], ["--noise-level", "200"], *words):
        with Image.open(run(model, tmp_path / "out", str(file), "2", *option)) as image:
            assert (np.asarray(image) != plain).any(), option
            scale = json.loads(image.info["latentdiff"])["guidance_scale"]
        assert scale == (4.0 if option in words else 1.0), option
    capsys.readouterr()
    for arguments, told in (
        (["1"], "FACTOR: above 1"),
        (["2", "--noise-level", "400", "--model", str(model)], "trained up to 350"),
        (["2", "--model", "emoji128"], "enlarges no pictures: --model names one"),
    ):
        assert main(["enlarge", str(file), *arguments, "--out", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_the_bundled_model_brings_back_what_lanczos_blurs(tmp_path: Path) -> None:
    """A drawing that nobody trained it on; in windows, as it is larger than the model's own."""
    sharp = Image.new("RGB", (1600, 1200), "white")
    pen = ImageDraw.Draw(sharp)
    pen.ellipse((150, 120, 900, 870), fill="gold", outline="saddlebrown", width=50)
    pen.polygon([(800, 300), (1500, 500), (1000, 1100)], fill="royalblue")
    large = sharp.resize((200, 150), Image.Resampling.LANCZOS)
    small = large.resize((100, 75), Image.Resampling.LANCZOS)
    small.save(tmp_path / "small.png")
    line = ["enlarge", str(tmp_path / "small.png"), "2", "--seed", "0", "--out", str(tmp_path)]
    assert main(line) == 0
    made = Image.open(tmp_path / "00000-0.png").convert("RGB")
    assert made.size == large.size
    lanczos = small.resize(large.size, Image.Resampling.LANCZOS)
    gains = [psnr(to_tensor(one)[None], to_tensor(large)[None]).item() for one in (lanczos, made)]
    assert gains[1] > gains[0] + 3, gains
    again = made.resize(small.size, Image.Resampling.LANCZOS)
    assert psnr(to_tensor(again)[None], to_tensor(small)[None]).item() > 40
