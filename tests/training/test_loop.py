"""The loop of training on two small networks that step apart, and on state beside them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdiff.learning.checkpoint import Tensors, checkpoints
from latentdiff.learning.config import OptimConfig, RunConfig
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.order import Key, SampleOrder, columns, sample_noise
from latentdiff.learning.run import Run
from latentdiff.learning.trained import Trained, learning_rate

STEPS = 7
OPTIM = OptimConfig(lr=0.1, steps=STEPS, batch_size=4, warmup=3, ema_decay=0.5, clip=0.2)
OTHER = OptimConfig(lr=0.02, steps=STEPS, schedule="constant", warmup=0, ema_decay=0.9)


class Killed(Exception):
    """Stand-in for a kill."""


class Apart(Objective[Key]):
    """A network that steps at every second step, a critic that always does, and a mean of both."""

    def __init__(self, run: Run, kill_at: int = 0) -> None:
        self.run, self.kill_at = run, kill_at
        self.order = SampleOrder(10, run.config.seed)
        self.model, self.critic = networks()
        self.slow = Trained("model", self.model, OPTIM)
        self.fast = Trained("critic", self.critic, OTHER)
        self.trained = [self.slow, self.fast]
        self.mean = torch.zeros(())
        self.evaluated: list[int] = []
        self.finished = 0

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        return losses(self.slow.network, self.fast.network, self.mean, items)

    def stepping(self, step: int) -> Sequence[Trained]:
        return self.trained if step % 2 else [self.fast]

    def after_step(self, step: int, values: dict[str, Tensor]) -> None:
        self.mean = 0.9 * self.mean + 0.1 * values["loss"]

    def state(self) -> tuple[dict[str, Tensors], dict[str, object]]:
        return {"means": {"loss": self.mean}}, {"kind": "apart"}

    def load_state(self, tensors: dict[str, Tensors], values: dict[str, object]) -> None:
        self.mean = tensors["means"]["loss"]
        assert values["kind"] == "apart"

    def evaluate(self, step: int) -> dict[str, float]:
        if step == self.kill_at:
            raise Killed
        self.evaluated.append(step)
        return {"size": float(self.model.weight.detach().abs().sum())}

    def finish(self) -> None:
        self.finished += 1


def networks() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(3, 1), nn.Linear(3, 1)


def losses(
    model: nn.Module, critic: nn.Module, mean: Tensor, keys: Sequence[Key]
) -> dict[str, Tensor]:
    """Both networks have a gradient at every step; the mean of before is in the loss."""
    step, places, samples = columns(keys)
    x = sample_noise(0, step, places, (3,))[0]
    wanted = torch.tensor(samples, dtype=torch.float32)[:, None] / 10
    error = (model(x) - wanted).square().mean()
    told = (critic(x) - (1 + mean) * wanted).square().mean()
    return {"loss": error + told, "error": error}


def run(out: Path, kill_at: int = 0, keep: int = 2) -> Apart:
    config = RunConfig(
        out=out,
        optim=OPTIM,
        log_every=1,
        evaluate_every=2,
        checkpoint_every=1,
        keep_checkpoints=keep,
    )
    with Run(config) as one:
        objective = Apart(one, kill_at)
        fit(one, objective)
    return objective


def files(out: Path, step: int) -> dict[str, Tensor]:
    folder = out / "checkpoints" / f"step-{step:08d}"
    return {
        f"{path.stem}/{name}": value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_two_networks_step_apart_as_a_plain_loop_has_them(tmp_path: Path) -> None:
    """Gradients of a step that a network does not take are lost, its average waits, and each has
    its own rate, clipping and decay."""
    run(tmp_path, keep=99)
    pair, mean, order = networks(), torch.zeros(()), SampleOrder(10, 0)
    averages = [network.weight.detach().clone() for network in pair]
    optimizers = [
        torch.optim.AdamW(n.parameters(), betas=o.betas, weight_decay=o.weight_decay)
        for n, o in zip(pair, (OPTIM, OTHER), strict=True)
    ]
    updates = [0, 0]
    for step in range(STEPS):
        keys = [(step, place, sample) for place, sample in enumerate(order.batch(step, 4))]
        loss = losses(*pair, mean, keys)["loss"]
        for number, optim in enumerate((OPTIM, OTHER)):
            own = list(pair[number].parameters())
            gradients = torch.autograd.grad(loss, own, retain_graph=True)
            if number == 0 and step % 2 == 0:
                continue
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(own, optim.clip)
            optimizers[number].param_groups[0]["lr"] = learning_rate(optim, step)
            optimizers[number].step()
            updates[number] += 1
            decay = min(optim.ema_decay, (1 + updates[number]) / (10 + updates[number]))
            averages[number].lerp_(pair[number].weight.detach(), 1 - decay)
        mean = 0.9 * mean + 0.1 * loss.detach()
        saved = files(tmp_path, step + 1)
        wanted = [pair[0].weight, pair[1].weight, *averages, mean]
        names = "model/weight", "critic/weight", "ema/weight", "critic_ema/weight", "means/loss"
        for name, value in zip(names, wanted, strict=True):
            assert (saved[name] - value.detach()).abs().max() < 1e-6, (step, name)
    assert updates == [3, 7]


def test_a_run_killed_while_it_evaluates_has_saved_and_evaluates_first(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(whole).evaluated == [2, 4, 6, 7]
    for at, newest in ((4, 4), (4, 4), (7, 7)):  # the second again at once
        with pytest.raises(Killed):
            run(out, kill_at=at)
        assert checkpoints(out / "checkpoints")[0].name == f"step-{newest:08d}"
    last = run(out)
    assert (last.evaluated, last.finished) == ([7], 1)
    expected, got = files(whole, 7), files(out, 7)
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[name]) for name, value in expected.items())
    run(out)  # and evaluates what it had evaluated
    log = (out / "log.jsonl").read_text()
    assert log == (whole / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines() if "size" in line] == [2, 4, 6, 7]


def test_networks_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    with Run(RunConfig(out=tmp_path, optim=OPTIM)) as one:
        objective = Apart(one)
        objective.fast.name = "model"
        with pytest.raises(ValueError, match="two files of a checkpoint have one name"):
            fit(one, objective)
    assert not checkpoints(tmp_path / "checkpoints")


def test_weights_of_another_network_are_not_loaded() -> None:
    trained = Trained("model", nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)), OPTIM)
    trained.module[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    weights = trained.weights()
    assert {name.partition(".")[0] for name in weights} == {"1"}  # buffers, too
    assert "1.running_mean" in weights
    trained.load_weights(weights)
    del weights["1.running_mean"]
    with pytest.raises(ValueError, match=r"of another network: 1\.running_mean"):
        trained.load_weights(weights)
