"""The pieces of training, each against what it must equal."""

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import draw_weights

from latentdiff.diffusion.prediction import Prediction, to_x0
from latentdiff.diffusion.process import create
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import (
    load_newest,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from latentdiff.learning.config import (
    DataConfig,
    OptimConfig,
    RunConfig,
    load_config,
    put,
    validate,
)
from latentdiff.learning.denoising import draw_times, noised_batch
from latentdiff.learning.ema import EMA
from latentdiff.learning.losses import adaptive_weight, min_snr_gamma, min_snr_weight, weighted_mse
from latentdiff.learning.optimizers import OptimizerName, make_optimizer
from latentdiff.learning.order import (
    SampleOrder,
    Shares,
    Stream,
    generator,
    sample_noise,
    spread_uniform,
)
from latentdiff.learning.trained import Trained, averages, learning_rate
from latentdiff.metrics.perceptual import VGG_STAGES, VGG_WIDTHS, lpips, random_features
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.models.fresh_text import train_tokenizer
from latentdiff.models.vae import Autoencoding, build_vae, standardise_latents

STEP = st.integers(0, 10_000)
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="pip install 'latentdiff[8bit]', as .ci/run does"
)


def tiny_vae(kind: Literal["kl", "vq"] = "kl") -> Any:
    with torch.random.fork_rng([]):
        return draw_weights(build_vae(kind, (8, 16), 1, 4, 4, 16, codes=8), 0)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_term_of_stage_1_reaches_the_encoder_and_the_decoder(
    kind: Literal["kl", "vq"],
) -> None:
    vae = tiny_vae(kind)
    real = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fake, regulariser = Autoencoding(vae)(real, sample_noise(0, 0, [0, 1], (4, 8, 8))[0])
    terms = {
        "l1": (fake - real).abs().mean(),
        "perceptual": random_features()(fake, real).mean(),
        "regulariser": regulariser,
        "adversarial": -PatchDiscriminator(8, 1)(fake).mean(),
    }
    for name, term in terms.items():
        into = torch.autograd.grad(
            term, vae.encoder.conv_in.weight, retain_graph=True, allow_unused=True
        )[0]
        assert into is not None, name
        assert into.abs().max() > 0, name
        if name != "regulariser":
            (out,) = torch.autograd.grad(term, vae.decoder.conv_out.weight, retain_graph=True)
            assert out.abs().max() > 0, name


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    weight = torch.tensor([3.0, -1.0], requires_grad=True)
    ratio = adaptive_weight((weight * 4).sum(), (weight * torch.tensor([0.0, 0.5])).sum(), weight)
    assert ratio.item() == pytest.approx(32**0.5 / (0.5 + 1e-4))


@pytest.mark.parametrize("process", ["vp-scaled-linear", "vp-cosine"])
def test_min_snr_weights_one_x0_error_alike_in_every_prediction(process: str) -> None:
    """The weighted loss depends on the x0 that a network implies, not on how it says it."""
    random = torch.Generator().manual_seed(0)
    x0, noise, error = (torch.randn(5, 2, 4, 4, generator=random) for _ in range(3))
    t = torch.tensor([0.0, 10.0, 300.0, 700.0, 998.0], dtype=torch.float64)
    vp = create(process)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in vp.alpha_sigma(t))
    losses = []
    predictions: tuple[Prediction, ...] = ("x0", "eps", "v")
    for prediction in predictions:
        batch = noised_batch(vp, prediction, x0, noise, t, 5.0)
        # the output whose x0 is off by 0.1 error: outputs are affine in x0 at a fixed x_t
        x_t = alpha.float() * x0 + sigma.float() * noise
        slope = (
            to_x0(prediction, batch.target + 1.0, x_t, alpha, sigma)
            - to_x0(prediction, batch.target, x_t, alpha, sigma)
        ).double()
        output = batch.target.double() + 0.1 * error / slope
        losses.append((output - batch.target).square().flatten(1).mean(1) * batch.weights)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=2e-3, atol=0)


def test_min_snr_refuses_what_it_is_not_defined_for() -> None:
    with pytest.raises(ValueError, match="flow"):
        min_snr_weight(torch.zeros(1), "flow")
    vp, to_noise = create("vp-scaled-linear"), create("vp-scaled-linear-zsnr")
    names: tuple[Prediction, ...] = ("eps", "x0", "v", "flow", "score")
    assert [min_snr_gamma("auto", name, vp) for name in names] == [5.0, 5.0, None, None, None]
    assert [min_snr_gamma(gamma, "x0", to_noise) for gamma in ("auto", 5.0)] == [None, 5.0]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_the_target_of_stage_2_implies_the_clean_latents(prediction: Prediction) -> None:
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 2, 2, generator=random) for _ in range(2))
    process = create("flow" if prediction == "flow" else "vp-scaled-linear")
    t = draw_times(process, torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64), "uniform")
    batch = noised_batch(process, prediction, x0, noise, t, None)
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in process.alpha_sigma(t))
    implied = to_x0(prediction, batch.target, batch.x, alpha, sigma)
    assert (implied - x0).abs().max() < 1e-5
    assert weighted_mse(batch.target, batch.target, batch.weights) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 5), count=st.integers(1, 40), step=STEP, size=st.sampled_from([4, 8]))
def test_every_way_of_sharing_a_step_out_gives_its_one_batch(
    seed: int, count: int, step: int, size: int
) -> None:
    order = SampleOrder(count, seed)
    whole = order.batch(step, size)
    assert SampleOrder(count, seed).batch(step, size) == whole
    for world in (1, 2, 4):
        shares = [
            key
            for rank in range(world)
            for share in Shares(order, range(step, step + 1), size, rank, world)
            for key in share
        ]
        assert shares == [(step, place, whole[place]) for place in range(size)]


def test_an_epoch_holds_each_sample_about_as_often_as_its_weight_says() -> None:
    weights = np.array([0.5, 0.25, 0.125, 0.125])
    order = SampleOrder(4, 0, weights)
    counts = np.bincount(np.concatenate([order.epoch(e) for e in range(2000)]), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), weights, atol=0.01)
    assert sorted(SampleOrder(9, 3).epoch(7)) == list(range(9))


def test_noise_and_times_belong_to_step_and_place_alone() -> None:
    whole = sample_noise(1, 5, [0, 1, 2, 3], (2, 3), 2)
    part = sample_noise(1, 5, [3, 1], (2, 3), 2)
    assert torch.equal(part, whole[:, [3, 1]])
    assert not torch.equal(sample_noise(1, 6, [0], (2, 3), 2), whole[:, :1])
    times = spread_uniform(1, 5, [0, 1, 2, 3], 4)
    assert torch.equal(spread_uniform(1, 5, [2], 4), times[2:3])
    assert torch.allclose(times.sort().values.diff(), torch.full((3,), 0.25, dtype=torch.float64))


def test_no_two_keys_are_one_and_streams_are_what_they_were() -> None:
    """(7, 6) was (7, 6, 0, 0), and 2**32 + 5 was 5, 1."""
    keys = [
        (seed, stream, when, which)
        for seed in (0, 7)
        for stream in Stream
        for when in (0, 1, 6)
        for which in (0, 2, 3)
    ]
    assert len({generator(*key).integers(2**62) for key in keys}) == len(keys)
    for key in ((7, Stream.ORDER, 6, 0), (7, Stream.NOISE, 5, 3), (0, Stream.HELD_OUT, 0, 0)):
        short = np.trim_zeros(np.array(key), "b").tolist() or [0]
        plain = np.random.Generator(np.random.Philox(np.random.SeedSequence(short)))
        assert plain.integers(2**62) == generator(*key).integers(2**62)
    old = np.random.Generator(np.random.Philox(np.random.SeedSequence((3, 1, 7))))
    old.random()
    assert SampleOrder(9, 3).epoch(7).tolist() == old.permutation(9).tolist()
    with pytest.raises(ValueError, match="must be from 0"):
        generator(2**32 + 5, Stream.TIMES, 0, 0)


def test_latents_are_standardised_without_changing_a_picture() -> None:
    vae = tiny_vae().eval()
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    before = DiffusersAutoencoder(vae).moments(pictures)
    with torch.no_grad():
        drawn = vae.decode(before[:, :4]).sample
    mean, std = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 2.0, 1.5, 1.0])
    standardise_latents(vae, mean, std)
    after = DiffusersAutoencoder(vae).moments(pictures)
    with torch.no_grad():
        again = vae.decode(after[:, :4]).sample
    wanted = (before[:, :4] - mean[:, None, None]) / std[:, None, None]
    assert (after[:, :4] - wanted).abs().max() < 1e-5
    assert (after[:, 4:] - before[:, 4:] / std[:, None, None]).abs().max() < 1e-5
    assert (again - drawn).abs().max() < 1e-5


def test_ema_is_the_average_it_claims_and_lends_its_weights_for_a_while() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(module, 0.5)
    start = module.weight.item()
    with torch.no_grad():
        module.weight.fill_(2.0)
    ema.update()
    decay = 2 / 11  # the warm-up of the first update
    expected = decay * start + (1 - decay) * 2.0
    with ema.applied():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 2.0


@pytest.mark.parametrize(
    "kind",
    [
        *("adamw", "prodigy", "schedule-free", "muon"),
        pytest.param("adamw-8bit", marks=NEEDS_BITSANDBYTES),
    ],
)
def test_an_optimizer_comes_back_exactly(tmp_path: Path, kind: OptimizerName) -> None:
    def make(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(iter(weights), kind, OptimConfig(lr=0.1), weights[1:2])

    def steps(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], count: int):
        for _ in range(count):
            optimizer.zero_grad()
            torch.stack([weight.square().sum() for weight in weights]).sum().backward()
            optimizer.step()

    generator = torch.Generator().manual_seed(0)
    sizes = (2,), (64, 64), (4096, 2)  # 8 bits from 4,096 values on
    one = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    first = make(one)
    steps(first, one, 3)
    two = [torch.nn.Parameter(weight.detach().clone()) for weight in one]
    second = make(two)
    save_checkpoint(tmp_path, 3, {"optimizer": pack_optimizer(first)}, {})
    found = load_newest(tmp_path)
    assert found is not None
    unpack_optimizer(second, found[0]["optimizer"])
    steps(first, one, 2)
    steps(second, two, 2)
    for mine, other in zip(one, two, strict=True):
        assert torch.equal(mine, other)


def test_schedule_free_weights_rest_at_their_average_and_come_back_to_the_bit() -> None:
    """Defazio et al. 2024, eq. 1: gradients are taken at y = (1 - beta) z + beta x; x is drawn."""
    module = torch.nn.Linear(40, 40)
    optim = OptimConfig(lr=0.1, schedule="constant", ema_decay=0.0)
    make = partial(make_optimizer, name="schedule-free", optim=optim)
    trained = Trained("model", module, optim, make, averaged=False)
    trained.parameters = list(module.parameters())
    for _ in range(5):
        module(torch.ones(1, 40)).square().sum().backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    y, z = module.weight.detach().clone(), trained.optimizer.state[module.weight]["z"]
    with averages([trained]):
        x = module.weight.detach().clone()
    assert (y - (0.1 * z + 0.9 * x)).abs().max() < 1e-6
    assert (y - x).abs().max() > 1e-3
    assert torch.equal(module.weight, y)
    trained.optimizer.step()  # it is in training again


def test_muon_steps_matrices_orthogonally_and_all_else_as_adamw_does() -> None:
    optim = OptimConfig(lr=0.1, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    matrix, vector, twin = (
        torch.nn.Parameter(torch.randn(size, generator=generator)) for size in ((8, 32), 5, 5)
    )
    twin.data.copy_(vector.data)
    before = matrix.detach().clone()
    both = make_optimizer(iter([matrix, vector]), "muon", optim)
    plain = make_optimizer(iter([twin]), "adamw", optim)
    loss = (matrix * torch.randn(8, 32, generator=generator)).sum()
    (loss + vector.square().sum() + twin.square().sum()).backward()
    both.step()
    plain.step()
    assert torch.equal(vector, twin)
    singular = torch.linalg.svdvals(before - matrix.detach())
    assert singular.min() / singular.max() > 0.4  # 0.5 to 1.5 of one, by Newton-Schulz in bfloat16


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    optim = OptimConfig(lr=1.0, warmup=10, steps=110)
    assert learning_rate(optim, 0) == pytest.approx(0.1)
    assert learning_rate(optim, 9) == pytest.approx(1.0)
    assert learning_rate(optim, 60) == pytest.approx(0.5)
    assert learning_rate(optim, 109) < 1e-3


class Config(RunConfig):
    data: DataConfig


def test_a_config_takes_overrides_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("out: a\ndata: {root: b}\noptim: {lr: 1e-4}\n")
    config = load_config(Config, path, ["optim.steps=7", "seed=3", "data.where.style=[noto]"])
    assert config.optim.lr == 1e-4  # a string to PyYAML
    assert (config.optim.steps, config.seed) == (7, 3)
    assert config.data.where == {"style": ["noto"]}
    for override in (
        *("optim.speed=1", "optim.steps=0", "seed", "seed.a=1", "seed=4294967296"),
        *("optim.lr=fast", "optim.lr=.inf", "optim.weight_decay=.nan"),
    ):
        with pytest.raises(UserError, match=override.partition("=")[0].split(".")[-1]):
            load_config(Config, path, [override])
    with pytest.raises(UserError, match="cannot read"):
        load_config(Config, tmp_path / "none.yaml", [])
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="is not YAML"):
        load_config(Config, path, [])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_encodes(text: str) -> None:
    tokenizer = TOKENIZER
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates are no text
    ids = tokenizer(text)["input_ids"]
    assert all(isinstance(number, int) for number in ids)
    assert ids[0] == len(tokenizer) - 2
    assert ids.count(tokenizer.eos_token_id) == 1 + text.lower().count("<|endoftext|>")


TOKENIZER = train_tokenizer(["a red heart", "a red cat", "the heart"] * 3, 600, 12)


def test_a_tokenizer_learns_the_captions_words_and_survives_its_folder(tmp_path: Path) -> None:
    assert TOKENIZER.tokenize("a RED heart") == ["a</w>", "red</w>", "heart</w>"]
    TOKENIZER.save_pretrained(tmp_path)
    again = type(TOKENIZER).from_pretrained(tmp_path)
    prompt = "A red Zürich, 漢字!"
    assert again(prompt)["input_ids"] == TOKENIZER(prompt)["input_ids"]
    assert again.model_max_length == 12


def test_lpips_reads_its_weights_and_refuses_others(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    width = 3
    for number, indices in enumerate(VGG_STAGES):
        wider = VGG_WIDTHS[number]
        for index in indices:
            state[f"features.{index}.weight"] = torch.randn(wider, width, 3, 3, generator=random)
            state[f"features.{index}.weight"] /= (4.5 * width) ** 0.5
            state[f"features.{index}.bias"] = torch.zeros(wider)
            width = wider
        state[f"lin{number}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=random)
    path = tmp_path / "lpips.safetensors"
    save_file(state | {"classifier.0.bias": torch.zeros(1)}, path)
    distance = lpips(path)
    a = torch.rand(2, 3, 32, 32, generator=random, requires_grad=True)
    b = torch.rand(2, 3, 32, 32, generator=random)
    assert distance(a, a.detach()).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(distance(a, b).sum(), a)
    assert gradient.abs().max() > 0
    for name, value, said in (
        ("lin3.model.1.weight", None, "lin3.weight is not in the weights"),
        ("features.0.bias", torch.full((64,), math.nan), "features.0.bias holds NaN"),
        ("features.0.bias", torch.zeros(64, dtype=torch.int8), "not floating point"),
        ("features.2.weight", torch.zeros(64, 64, 1, 1), r"should be \[64, 64, 3, 3\]"),
        ("features.30.weight", torch.zeros(1), "not in this network"),
    ):
        save_file({k: v for k, v in (state | {name: value}).items() if v is not None}, path)
        with pytest.raises(UserError, match=said):
            lpips(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        lpips(path)
    with pytest.raises(UserError, match="no such file"):
        lpips(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("key", "near"),
    [("optim.step", "optim.steps"), ("lr", "optim.lr"), ("optim.seed", "seed"), ("zzz", None)],
)
def test_an_unknown_key_gets_the_nearest(key: str, near: str | None) -> None:
    told = f"run.yaml: {key}: there is no such key" + (f"; did you mean {near}?" if near else "")
    with pytest.raises(UserError) as refused:
        validate(RunConfig, put({"out": "out"}, key, 1), "run.yaml")
    assert str(refused.value) == told
