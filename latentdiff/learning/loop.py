"""THE training loop: resume, prepare, gradients, optimise, average, record, save, evaluate, stop.

A stage is an `Objective`: what learns, the loss of a micro-batch, what is drawn and what is left.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from latentdiff.learning.accumulate import Item
from latentdiff.learning.checkpoint import Tensors, pack_optimizer, unpack_optimizer
from latentdiff.learning.order import Order, Shares
from latentdiff.learning.run import Run
from latentdiff.learning.trained import Trained, averages, prepare


class Objective(Protocol[Item]):
    """A stage of training, as the loop sees it; a subclass has the defaults that stand here.

    An item is what `terms` needs of one sample: its `Key`, unless `batches` makes more of it. All
    that is random in a step is a function of the keys, so that a resumed run is the uninterrupted
    one.

    Attributes:
        trained: the networks that learn, the main one first.
        order: the order of the samples.
        told: the term that the progress bar tells.
    """

    trained: Sequence[Trained]
    order: Order
    told: str = "loss"

    @abstractmethod
    def terms(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """The terms of a micro-batch's loss, means over its items: scalars, recorded by name.

        "loss" has the graph. It is a pure function of the items and the weights: after a lack of
        memory it is asked again, for fewer items.
        """

    def batches(self, shares: Shares) -> Iterable[Sequence[Item]]:
        """This process's items of each step; by default the keys themselves."""
        return shares  # pyright: ignore[reportReturnType]: then Item is Key

    def stepping(self, step: int) -> Sequence[Trained]:
        """Select the networks of `trained` to update at `step`; gradients of others are dropped."""
        return self.trained

    def after_step(self, step: int, values: dict[str, Tensor]) -> None:
        """Called after each step, with the means of the terms: here `state` may change."""

    def stops(self) -> bool:
        """Tell, after a step or a resume, whether the run ends here and not at its last step; all
        processes must agree."""
        return False

    def state(self) -> tuple[dict[str, Tensors], dict[str, object]]:
        """Collect the rest of a checkpoint: tensors by file name, and values for JSON.

        Called on every process; tensors that are sharded over processes are saved whole.
        """
        return {}, {}

    def load_state(self, tensors: dict[str, Tensors], values: dict[str, object]) -> None:
        """Put back what `state` gave, before the networks are prepared; of all in a checkpoint."""

    def begin(self) -> None:
        """Called before the first step of a run that does not resume."""

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Measure and draw, with averaged weights; every process is asked.

        Where a save falls on `step`, it is written by then. A run that goes on from it evaluates
        first, because the one before may have been killed here; what it records is kept once.

        Returns:
            What the main process records and tells, by name; None: nothing.
        """

    def finish(self) -> None:
        """Write the result, with averaged weights; every process is asked."""


def fit(run: Run, objective: Objective[Item]) -> None:
    """Train to the last step of the run's configuration, from the newest checkpoint on if any.

    Raises:
        UserError: see `Run`; it cannot go on, or not save.
        SystemExit: a signal came; all up to the last whole step is saved.
    """
    config, last = run.config, run.config.optim.steps
    start = _resume(run, objective)
    if start and objective.stops():
        last = start
    stop = min(start + 1, last) if run.dry else last
    if not start:
        objective.begin()
    elif start % config.evaluate_every == 0 or start == last:
        _evaluate(run, objective, start)
    shares = Shares(
        objective.order,
        range(start, stop),
        config.optim.batch_size,
        run.accelerator.process_index,
        run.accelerator.num_processes,
    )
    with run.signals(), run.bar(start, stop) as bar:
        for step, items in zip(shares.steps, objective.batches(shares), strict=True):
            values = _step(run, objective, step, items)
            bar.update()
            done = step + 1
            if not run.dry and objective.stops():
                stop = done
            if done % config.log_every == 0 or done == stop:
                means = {name: value.item() for name, value in values.items()}
                run.record(done, {**means, "lr": objective.trained[0].told_rate(step)})
                told = f"{means[objective.told]:.4f}"
                bar.set_postfix({objective.told: told, "bad": run.bad_steps})
            stopping = run.stopping
            if done % config.checkpoint_every == 0 or done == stop or stopping:
                _save(run, objective, done)
            if stopping:  # if there is something to draw, the run that goes on draws it first
                raise SystemExit(128 + stopping)
            if done % config.evaluate_every == 0 or done == stop:
                _evaluate(run, objective, done)
            if done == stop:
                break
    if run.dry:
        run.say("dry run: data, one step and one save are fine")
        return
    with averages(objective.trained):
        objective.finish()


def _resume(run: Run, objective: Objective[Item]) -> int:
    """Prepare the networks, as the newest checkpoint has them if there is one; its step, or 0."""
    found = run.resume()
    if found is None:
        prepare(run.accelerator, objective.trained)
        return 0
    tensors, values = found
    for one in objective.trained:
        one.load_weights(tensors[one.name])
    objective.load_state(tensors, values)
    prepare(run.accelerator, objective.trained)
    for one, prefix in _prefixed(objective.trained):
        unpack_optimizer(one.optimizer, tensors[f"{prefix}optimizer"])
        if one.ema is not None:
            updates = int(str(values[f"{prefix}ema_updates"]))
            one.ema.load_state_dict(tensors[f"{prefix}ema"], updates)
    return int(str(values["step"]))


def _save(run: Run, objective: Objective[Item], step: int) -> None:
    """Write all that `_resume` puts back."""
    tensors, values = objective.state()
    files = list(tensors.items())
    values = dict(values)
    for one, prefix in _prefixed(objective.trained):
        files.append((one.name, one.weights()))
        files.append((f"{prefix}optimizer", pack_optimizer(one.optimizer)))
        if one.ema is not None:
            files.append((f"{prefix}ema", one.ema.state_dict()))
            values[f"{prefix}ema_updates"] = one.ema.updates
    if len(dict(files)) < len(files):
        raise ValueError(f"two files of a checkpoint have one name: {[name for name, _ in files]}")
    run.save(step, dict(files), values)


def _prefixed(networks: Sequence[Trained]) -> list[tuple[Trained, str]]:
    """Each network, and what its optimizer's and its average's names in a checkpoint begin with."""
    return [(one, f"{one.name}_" if number else "") for number, one in enumerate(networks)]


def _step(
    run: Run, objective: Objective[Item], step: int, items: Sequence[Item]
) -> dict[str, Tensor]:
    """Take one optimizer step; the mean of every term over the global batch."""
    networks = [one.network for one in objective.trained]
    parameters = [p for one in objective.trained for p in one.parameters]
    values = run.gradients(networks, parameters, items, objective.terms)
    stepping = objective.stepping(step)
    if run.optimize(step, stepping):
        for one in stepping:
            one.average()
    for one in objective.trained:
        one.optimizer.zero_grad()
    objective.after_step(step, values)
    return values


def _evaluate(run: Run, objective: Objective[Item], step: int) -> None:
    with averages(objective.trained):
        found = objective.evaluate(step)
    if found:
        run.record(step, found)
        run.say(
            f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        )
