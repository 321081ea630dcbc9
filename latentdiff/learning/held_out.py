"""A held-out part of a fine-tune's pictures: its loss, and the weights that had the lowest.

The pictures, times and noise are the same at every measurement of every run, whatever its seed, so
that a curve tells of the weights alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.learning.accumulate import in_parts
from latentdiff.learning.control_pictures import ControlPictures
from latentdiff.learning.denoising import Times, draw_times, noised_batch
from latentdiff.learning.ema import trained_parameters
from latentdiff.learning.finetune_config import HeldOutConfig
from latentdiff.learning.inpainting_masks import Holes
from latentdiff.learning.order import Stream, generator
from latentdiff.learning.samples import Samples
from latentdiff.learning.sharding import gathered, split_again, split_like
from latentdiff.learning.trained import Trained

_TIMES = 8  # of each picture, spread evenly
_FEW = 20  # pictures, of fewer none is put aside by default
_MOST = 32  # pictures that are put aside by default


def put_aside(count: int, fraction: float | None) -> list[int]:
    """The numbers of the pictures to hold out: the same for all seeds.

    Args:
        fraction: of all; None: a tenth of 20 or more, at most 32.
    """
    if fraction is None:
        held = min(_MOST, count // 10) if count >= _FEW else 0
    else:
        held = min(count - 1, round(count * fraction))
    order = generator(0, Stream.HELD_OUT, 0, 0).permutation(count)
    return sorted(int(number) for number in order[:held])


class HeldOut:
    """Pictures that are put aside, what was measured on them, and the best weights so far.

    Args:
        samples: the pictures, as latents.
        times, within, gamma: of the times and of min-SNR weighting, as in training.
        holes: what an inpainting model is shown of them.
        controls: what a ControlNet is shown of them.

    Attributes:
        best: the lowest loss so far, its step, and how many measurements came after it.
    """

    def __init__(
        self,
        config: HeldOutConfig,
        samples: Samples,
        bundle: Bundle,
        times: Times,
        within: tuple[float, float],
        gamma: float | None,
        holes: Holes | None,
        controls: ControlPictures | None = None,
    ) -> None:
        self.config, self.samples, self.bundle = config, samples, bundle
        self.times: Times = times
        self.within = within
        self.gamma, self.holes, self.controls = gamma, holes, controls
        self.captions = [example.captions[0] for example in samples.examples]
        self.best: tuple[float, int, int] | None = None
        self.weights: dict[str, Tensor] = {}

    def due(self, step: int, last: int) -> bool:
        """Tell whether it is measured once `step` steps are taken."""
        return step % self.config.every == 0 or step == last

    @torch.no_grad()
    def loss(self, module: nn.Module) -> Tensor:
        """The mean loss over all pictures and times, a scalar: a function of the weights.

        Args:
            module: the `Conditioned` that learns.
        """
        losses: list[Tensor] = []
        for number in range(len(self.captions)):
            losses += in_parts(
                range(_TIMES), _TIMES, lambda places, n=number: self._losses(module, n, places)
            )
        split_again(module)
        return torch.stack(losses).mean()

    def _losses(self, module: nn.Module, number: int, places: Sequence[int]) -> list[Tensor]:
        bundle, moments = self.bundle, self.samples.moments[number][:1]
        device = next(module.parameters()).device
        mean = bundle.autoencoder.draw(moments, torch.zeros_like(moments.chunk(2, 1)[0]))
        latents = mean.expand(len(places), -1, -1, -1).to(device)
        draws = [generator(0, Stream.MEASURE, number, place) for place in places]
        rows = [draw.standard_normal(mean.shape[1:], dtype=np.float32) for draw in draws]
        noise = torch.from_numpy(np.stack(rows)).to(device)
        uniform = (torch.tensor(list(places), dtype=torch.float64, device=device) + 0.5) / _TIMES
        t = draw_times(bundle.process, uniform, self.times, self.within)
        batch = noised_batch(bundle.process, bundle.prediction, latents, noise, t, self.gamma)
        beside, hints, chosen = None, None, [(number, 0)] * len(places)
        if self.holes is not None:
            beside = self.holes.beside(bundle, 0, 0, list(places), chosen)
        if self.controls is not None:
            hints = self.controls.of(chosen).to(device)
        words = bundle.conditioner.tokenize([self.captions[number]]).take([0] * len(places))
        output = module(batch.x, batch.t, words, beside, pictures=hints)[
            :, : latents.shape[1]
        ].float()
        errors = (output - batch.target).square().flatten(1).mean(1)
        return list(batch.weights * errors)

    def note(self, step: int, loss: float, trained: Trained) -> None:
        """Take a measurement in, and the weights that it is of where it is the best."""
        if self.best is None or loss < self.best[0]:
            self.best = loss, step, 0
            if self.config.keep == "best":
                self.weights = {
                    name: _copied(gathered(p.detach()))
                    for name, p in trained_parameters(trained.module).items()
                }
        else:
            self.best = *self.best[:2], self.best[2] + 1

    @property
    def is_over(self) -> bool:
        """True once so many measurements in a row were no better that the run is to stop."""
        patience = self.config.patience
        return patience is not None and self.best is not None and self.best[2] >= patience

    @contextmanager
    def lent(self, trained: Trained) -> Iterator[int | None]:
        """Inside the context the network holds the best weights; gives their step, or None where
        no others are kept than the last."""
        if self.best is None or not self.weights:
            yield None
            return
        parameters = trained_parameters(trained.module)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        _put(self.weights, parameters)
        try:
            yield self.best[1]
        finally:
            _put(before, parameters)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
        """State for a checkpoint."""
        return {"best": self.weights} if self.weights else {}, {"best": self.best}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], values: dict[str, object]) -> None:
        """Put back what `state` gave; of a run that held out nothing there is none."""
        best = values.get("best")
        if isinstance(best, list):
            loss, step, since = best
            self.best, self.weights = (float(loss), int(step), int(since)), tensors.get("best", {})


def _copied(whole: Tensor) -> Tensor:
    """A plain tensor of its own in the computer's memory."""
    return torch.empty(whole.shape, dtype=whole.dtype).copy_(whole)


@torch.no_grad()
def _put(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(split_like(values[name], parameter))
