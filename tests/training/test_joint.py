"""Both stages learned at once, on twelve pictures and a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import tiny_bundle, with_own_networks

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.config import validate
from latentdiff.learning.joint import MixedPrior
from latentdiff.learning.run import Run
from latentdiff.pipeline import LatentDiffusionPipeline

BASE = {
    "optim": {"steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 0, "ema_decay": 0.5},
    "log_every": 1,
    "checkpoint_every": 2,
    "evaluate_every": 2,
    "save_dtype": "float32",
    "sample_prompts": ["a red disc"],
}
PARTS = ("unet", "vae")


def config_of(work: Path, out: Path, **settings: object):
    module = script("joint")
    data = {"root": str(work / "pictures"), "size": 16, "held_out_fraction": 0.2}
    values = {**BASE, "out": str(out), "model": str(work / "model"), "data": data, **settings}
    return module, validate(module.JointConfig, values, "test")


def learn(work: Path, out: Path, **settings: object) -> Path:
    """One run in this process."""
    module, config = config_of(work, out, **settings)
    module.train(config, False)
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`; `model`, a tiny bundle as a folder; `out`, a run out of it."""
    folder = tmp_path_factory.mktemp("joint")
    picture_folder(folder / "pictures")
    with_own_networks(tiny_bundle(statistics="channels")).save(folder / "model")
    learn(folder, folder / "out")
    return folder


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def test_a_run_that_goes_on_ends_in_the_same_two_networks(work: Path, tmp_path: Path) -> None:
    """From the save in the middle, drawn in between, which changes the last layer and puts it
    back."""
    shutil.copytree(work / "out", tmp_path / "out")
    shutil.rmtree(checkpoints(tmp_path / "out/checkpoints")[0])
    shutil.rmtree(tmp_path / "out/model")
    learn(work, tmp_path / "out")
    for part in PARTS:
        whole, again = weights(work / "out/model", part), weights(tmp_path / "out/model", part)
        first = weights(work / "model", part)
        assert all(torch.equal(value, again[key]) for key, value in whole.items())
        assert any((value - first[key]).abs().max() > 1e-4 for key, value in whole.items())
    assert (tmp_path / "out/log.jsonl").read_bytes() == (work / "out/log.jsonl").read_bytes()
    lines = [json.loads(line) for line in (work / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "held out" in line] == [2, 4]


def test_what_is_left_is_a_plain_model_with_the_mixing_in_it(work: Path) -> None:
    """At first the very model; folded, the last layer has a in it."""
    bundle = Bundle.load(work / "model")
    before = bundle.network.module.get_parameter("conv_out.weight").clone()
    x, t = (
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([400.0]),
    )
    told = bundle.conditioner.states(bundle.conditioner.tokenize(["a red disc"]))
    plain = bundle.network(x, t, bundle.conditioner.condition(told, (16, 16)))
    mixed = MixedPrior(bundle)
    assert (mixed(x, t, told) - plain).abs().max() < 1e-5
    with torch.no_grad():
        mixed.mixing[1] = 0.0
    assert mixed.a[1] == 0.5
    answer = mixed(x, t, told)
    assert (answer - plain).abs().max() > 0.01
    with mixed.folded():
        folded = bundle.network(x, t, bundle.conditioner.condition(told, (16, 16)))
        assert (folded - answer).abs().max() < 1e-5
    assert (
        bundle.network.module.get_parameter("conv_out.weight") * mixed.a.view(-1, 1, 1, 1) - before
    )[[0, 2, 3]].abs().max() < 1e-6
    model = Bundle.load(work / "out/model")
    assert model.prediction == "v"
    settings = {"num_inference_steps": 2, "seed": 0, "progress": False}
    assert len(LatentDiffusionPipeline(model)("a red disc", **settings).images) == 1


def test_the_two_networks_learn_by_weights_of_their_own(work: Path, tmp_path: Path) -> None:
    """The encoder's gradient is the likelihood's, whatever the prior learns by; the prior's is
    not the same by both, and the bound that is told is."""
    found: list[tuple[torch.Tensor, torch.Tensor, float]] = []
    for kind in ("likelihood", "unweighted"):
        module, config = config_of(work, tmp_path / kind, prior=kind)
        with Run(config, True) as run:
            joint = module.Joint(config, run)
            random = torch.Generator().manual_seed(0)
            real = torch.rand(4, 3, 16, 16, generator=random) * 2 - 1
            noise = torch.randn(2, 4, 4, 8, 8, generator=random)
            words = joint.states.of(0, [0, 1, 2, 3], [0, 1, 2, 3])
            terms = joint.bound(real, noise, words, [0.1, 0.4, 0.6, 0.9])
            terms["loss"].backward()
            grads = [
                network.get_parameter(name).grad
                for network, name in (
                    (joint.vae.vae, "encoder.conv_in.weight"),
                    (joint.mixed.unet, "conv_in.weight"),
                )
            ]
            found.append((grads[0], grads[1], terms["bits"].item()))
    (of_one, prior_one, bits_one), (of_other, prior_other, bits_other) = found
    assert (of_one - of_other).abs().max() < 1e-4 * of_one.abs().max()
    assert (prior_one - prior_other).abs().max() > 0.1 * prior_one.abs().max()
    assert bits_one == pytest.approx(bits_other, rel=1e-6)


def test_captions_are_left_out_as_often_as_it_says(work: Path, tmp_path: Path) -> None:
    """Or guidance would start from a branch that did not go along with the latents."""
    module, config = config_of(work, tmp_path / "out")
    assert config.caption_dropout == 0.1
    with Run(config.model_copy(update={"caption_dropout": 1.0}), True) as run:
        joint = module.Joint(run.config, run)
        empty = joint.bundle.conditioner.states(joint.bundle.conditioner.tokenize([""])).states
        told = joint.states.of(0, [0, 1], [0, 1]).states
    assert (told[:, : empty.shape[1]] - empty).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("made", "line"),
    [
        ({"prediction": "eps"}, "predict v"),
        ({"process": "flow"}, "variance-preserving"),
        ({"vae": "vq"}, "KL autoencoders"),
        ({"in_channels": 9}, "plain text-to-image"),
    ],
)
def test_what_cannot_be_trained_jointly_is_one_line(
    work: Path, tmp_path: Path, made: dict[str, object], line: str
) -> None:
    bundle = tiny_bundle(**made)  # pyright: ignore[reportArgumentType]
    bundle.save(tmp_path / "model")
    with pytest.raises(UserError, match=line):
        learn(work, tmp_path / "out", model=str(tmp_path / "model"))
