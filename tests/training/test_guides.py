"""The guides' training on twelve pictures: stopped and resumed, opened, and badly fed."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripts import picture_folder, script
from tiny import tiny_bundle
from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.guidance import Classifier, Clip
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.config import OptimConfig
from latentdiff.learning.losses import contrastive
from latentdiff.learning.trained import learning_rate
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.vae import build_vae, standardise_latents
from latentdiff.pictures import open_picture, to_tensor

TASKS: dict[str, dict[str, Any]] = {
    "classifier": {"kind": "classifier", "label": "colour", "width": 8},
    "clip": {
        "kind": "clip",
        "patch": 8,
        "width": 32,
        "layers": 1,
        "text_layers": 1,
        "heads": 2,
        "vocabulary": 540,
        "window": 8,
        "shift": 1,
    },
}
COLOURS = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture folder with the colour as a field, and a model whose latents are classified."""
    folder = tmp_path_factory.mktemp("guides")
    rows = (picture_folder(folder / "pictures", 12, 32) / "metadata.jsonl").read_text()
    named = [json.loads(row) for row in rows.splitlines()]
    for row in named:
        row["colour"] = row["text"].split()[1]
    lines = "".join(json.dumps(row) + "\n" for row in named)
    (folder / "pictures/metadata.jsonl").write_text(lines)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # not `draw_weights`, of whose latents colours are learned slowly
        vae: Any = build_vae("kl", (8, 8), 1, 4, 4, 16).eval().requires_grad_(False)
    vae.quant_conv.bias[4:] -= 20  # a sure posterior
    raw = DiffusersAutoencoder(vae).moments(pictures(folder))[:, :4]
    standardise_latents(vae, raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    bundle = replace(tiny_bundle(), autoencoder=DiffusersAutoencoder(vae))
    bundle.save(folder / "model")
    return folder


def pictures(work: Path) -> Tensor:
    """Twelve discs, [12, 3, 32, 32]: red, green, blue, red, ..."""
    paths = [work / f"pictures/{number}.png" for number in range(12)]
    return torch.stack([to_tensor(open_picture(path)) for path in paths])


def run(work: Path, kind: str, out: Path, *overrides: str, dry: bool = False) -> None:
    """One run of the script's `train`, as the command line calls it but with errors passed on."""
    module = script("guides")
    config = {
        "out": str(out),
        "data": {
            "root": str(work / "pictures"),
            "size": 32,
            "held_out": {"base": ["0", "1", "2"]},
        },
        "task": TASKS[kind] | ({"model": str(work / "model")} if kind == "classifier" else {}),
        "optim": {"lr": 1e-2, "steps": 40, "warmup": 2, "batch_size": 6, "ema_decay": 0.5},
        "evaluate_every": 40,
        "checkpoint_every": 1,
        "save_dtype": "float32",
    }
    path = work / f"{kind}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    module.train(module.load_config(module.GuidesConfig, path, list(overrides)), dry)


@pytest.mark.parametrize("kind", TASKS)
def test_a_stopped_run_goes_on_to_the_very_same_weights(
    kind: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(work, kind, whole, "optim.steps=4")

    steps = iter([False, True])

    def interrupted(optim: OptimConfig, step: int) -> float:
        if next(steps, False):
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(optim, step)

    monkeypatch.setattr("latentdiff.learning.trained.learning_rate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(work, kind, parts, "optim.steps=4")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoints(parts / "checkpoints")[0].name == "step-00000002"
    run(work, kind, parts, "optim.steps=4")
    for name in ("model", "ema", "optimizer"):
        expected, got = (
            load_file(checkpoints(folder / "checkpoints")[0] / f"{name}.safetensors")
            for folder in (whole, parts)
        )
        assert expected.keys() == got.keys()
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), name


def test_a_classifier_learns_colours_and_its_folder_opens(work: Path, tmp_path: Path) -> None:
    run(work, "classifier", tmp_path / "run", "optim.lr=0.03", "optim.steps=60")
    classifier = Classifier.load(tmp_path / "run/model")
    assert classifier.labels == sorted(COLOURS)
    bundle = Bundle.load(work / "model")
    level, latents = bundle.process.level(0.0), bundle.autoencoder.encode(pictures(work))
    every = [
        classifier.log_probability(latents, level, classifier.places([colour] * 12))
        for colour in COLOURS
    ]
    assert torch.stack(every).argmax(0).tolist() == [0, 1, 2] * 4
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert log[-1]["accuracy/t=0"] == 1


def test_a_clip_learns_pairs_and_its_folder_opens(work: Path, tmp_path: Path) -> None:
    run(work, "clip", tmp_path / "run")
    clip = Clip.load(tmp_path / "run/model")
    texts = clip.texts([f"a {colour} disc" for colour in COLOURS])
    with torch.no_grad():
        found = (clip.pictures(pictures(work)) @ texts.T).argmax(1)
    assert found.tolist() == [0, 1, 2] * 4


def test_a_dry_run_and_what_is_refused(work: Path, tmp_path: Path) -> None:
    run(work, "clip", tmp_path / "dry", dry=True)
    assert not checkpoints(tmp_path / "dry/checkpoints")
    assert not (tmp_path / "dry/model").exists()
    with pytest.raises(UserError, match="has no field 'shape'"):
        run(work, "classifier", tmp_path / "a", "task.label=shape")
    with pytest.raises(UserError, match="learns from all pairs of a batch"):
        run(work, "clip", tmp_path / "b", "optim.accumulation=2")
    with pytest.raises(UserError, match=r"lower optim.batch_size"):
        run_out_of_memory(work, "clip", tmp_path / "b")
    run_out_of_memory(work, "classifier", tmp_path / "memory")  # whose micro-batches shrink
    with pytest.raises(UserError, match="no picture is held out"):
        run(work, "clip", tmp_path / "b", "data.held_out={}", "data.held_out_fraction=0.0")
    with pytest.raises(UserError, match="task"):
        run(work, "clip", tmp_path / "c", "task.kind=vae")


def run_out_of_memory(work: Path, kind: str, out: Path) -> None:
    """A run whose network has no room for more than four pictures while it learns."""

    def refuse(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        known = type(module).__name__ in ("PairNetwork", "LatentClassifier")
        if known and torch.is_grad_enabled() and len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("no room")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        run(work, kind, out, "optim.steps=1")
    finally:
        handle.remove()


def test_the_contrastive_loss_by_hand() -> None:
    pictures, texts = torch.eye(3)[:2], torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
    logits = 2 * torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    rows = torch.logsumexp(logits, 1) - logits.diagonal()
    columns = torch.logsumexp(logits, 0) - logits.diagonal()
    got = contrastive(pictures, texts, torch.tensor(2.0))
    torch.testing.assert_close(got, 0.5 * (rows.mean() + columns.mean()))
