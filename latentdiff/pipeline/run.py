"""One call of the pipeline, prepared: it can be stepped, watched, cancelled and finished."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Denoiser, Estimate
from latentdiff.diffusion.edits import Edit
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.sampling import Move, moves
from latentdiff.diffusion.solver import Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.editing import Finish, RunContext
from latentdiff.errors import UserError
from latentdiff.guidance.prompt_schedule import StepCount
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.network import Network
from latentdiff.models.preview import check_same_latents, preview
from latentdiff.pipeline.output import OutputType, PipelineOutput, converted


@dataclass(eq=False)
class CountedNetwork:
    """A network that counts its calls; a generator is told noise out of the pictures' streams.

    Under all conditions of a picture it is the same noise.
    """

    network: Network
    noise: NoiseStreams
    calls: int = 0

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, perturbed: Sequence[int]
    ) -> Tensor:
        self.calls += 1
        if (width := self.network.noise_width) is not None:
            told = self.noise.draw((width,)).repeat(len(x) // len(self.noise), 1)
            condition = replace(condition, noise=told)
        return self.network(x, t, condition, perturbed)


@dataclass(eq=False)
class Run:
    """A call of which nothing is drawn yet; `LatentDiffusionPipeline.prepare` makes it.

    One run belongs to one thread, but for `cancel`.

    Attributes:
        denoise: guided.
        solver: makes the steps.
        levels: the levels that the run visits, jumps of edits included.
        latents: [B, C, h, w] as they are now; another tensor may be put there between two steps.
        noise: the streams of B pictures.
        edits: bound to this run.
        seeds, indices, cut, variation_seeds: see `PipelineOutput`.
        count: the move that is made, for prompts that change on the way.
        x0: the last estimate of the data [B, C, h, w]; None before the first.
    """

    denoise: Denoiser
    solver: Solver
    levels: Timetable
    latents: Tensor
    noise: NoiseStreams
    edits: Sequence[Edit]
    context: RunContext
    ending: Finish
    network: CountedNetwork
    seeds: list[int]
    indices: list[int]
    cut: list[str]
    count: StepCount
    variation_seeds: list[int]
    x0: Tensor | None = None
    cancelled: bool = False
    done: bool = False
    _begun: bool = field(default=False, init=False)

    def __len__(self) -> int:
        """The number of moves."""
        return len(self.levels) - 1

    def cancel(self) -> None:
        """Let the run end before its next step; from any thread."""
        self.cancelled = True

    def steps(self) -> Iterator[Move]:
        """Make the moves of the run, each when it is asked for.

        Raises:
            UserError: the run has begun already.
        """
        if self._begun:
            raise UserError("this run has been stepped through: prepare another.")
        self._begun = True
        run = moves(
            self.denoise,
            self.solver,
            self.levels,
            self.latents,
            edits=[*self.edits, _Noting(self)],
            noise=self.noise,
        )
        replaced: Tensor | None = None
        while not self.cancelled:
            try:
                with torch.no_grad():
                    move = run.send(replaced)
            except StopIteration as ended:
                self.latents, self.done = ended.value, True
                return
            self.latents, self.count.move = move.x, move.index + 1
            yield move
            replaced = None if self.latents is move.x else self.latents

    def preview(
        self,
        output_type: OutputType = "pil",
        *,
        quick: bool = False,
        by: Autoencoder | None = None,
    ) -> object:
        """Decode the present estimate, as pictures; the noise before the first step.

        Args:
            output_type: see `PipelineOutput.images`.
            quick: instead of decoding it, show its colours, one for each latent, by
                `latentdiff.models.preview`; the pictures are as large, and blurred.
            by: decode it with this autoencoder, as a tiny one that
                `latentdiff.load_autoencoder` read, instead of the model's.

        Returns:
            See `PipelineOutput.images`.

        Raises:
            UserError: `by` is of other latents, or comes with `quick`, which decodes nothing.
        """
        latents = self.latents if self.x0 is None else self.x0
        if by is not None:
            if quick:
                raise UserError("preview: quick decodes nothing: leave out it, or by.")
            check_same_latents(by, self.context.autoencoder)
            return self._pictures(latents, output_type, by)
        if not quick or output_type == "latent":
            return self._pictures(latents, output_type)
        autoencoder = self.context.autoencoder
        small = preview(autoencoder, latents)
        large = interpolate(small, scale_factor=float(autoencoder.factor), mode="bilinear")
        return converted(self.context.crop(large), output_type)

    def finish(self, output_type: OutputType = "pil") -> PipelineOutput:
        """Make the steps that are left, if none was made, and decode.

        Raises:
            UserError: the run was cancelled, or left in the middle.
        """
        if not self._begun:
            for _ in self.steps():
                pass
        if not self.done:
            how = "cancelled" if self.cancelled else "left before its last step"
            raise UserError(f"the run was {how}, so there is no picture; `preview` shows its last.")
        images = self._pictures(self.latents, output_type)
        calls = self.network.calls
        return PipelineOutput(
            images,
            self.seeds,
            self.indices,
            self.latents,
            calls,
            self.cut,
            self.variation_seeds,
        )

    @torch.no_grad()
    def _pictures(
        self, latents: Tensor, output_type: OutputType, by: Autoencoder | None = None
    ) -> object:
        if output_type == "latent":
            return latents
        pictures = self.context.crop((by or self.context.autoencoder).decode(latents))
        return converted(self.ending(pictures), output_type)


@dataclass(frozen=True, eq=False)
class _Noting:
    """An edit that changes nothing, and notes each estimate."""

    run: Run

    def denoiser(self, denoise: Denoiser) -> Denoiser:
        def noted(x: Tensor, level: NoiseLevel) -> Estimate:
            estimate = denoise(x, level)
            self.run.x0 = estimate.x0
            return estimate

        return noted
