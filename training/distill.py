"""Distil a model into one that draws in few steps, and in one call of the network a step.

    latentdiff train distill --config training/configs/emoji128-distill.yaml

The teacher is any model that loads, guided; the student learns its answers for captioned pictures,
and is told the guidance scale. Methods: guided (two calls become one), progressive (two steps
become one, again and again), consistency (each step of the teacher's leads to the same picture),
consistency-training (the same without a teacher). With `lora` the student is the model with a
LoRA, of one guidance scale. Ends by writing `OUT/model` in the diffusers layout, or the LoRA's
file with the `scheduler_config.json` of its solver and times: both in a folder `fast` of the model
are what `latentdiff generate --fast` draws with. Run the same command again to resume.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from shlex import quote
from typing import Annotated, Literal, Self

import torch
import typer
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from latentdiff.bundle import Bundle, Steps
from latentdiff.diffusion import timetable
from latentdiff.diffusion.condition import joined
from latentdiff.diffusion.prediction import to_x0
from latentdiff.diffusion.process import DiscreteVP
from latentdiff.errors import UserError
from latentdiff.files import write_json
from latentdiff.formats import scheduler_config
from latentdiff.learning.captioned_latents import CaptionedLatents, check_size
from latentdiff.learning.card import Outcome, share
from latentdiff.learning.checkpoint import Tensors
from latentdiff.learning.command import ConfigFile, DryRun, Overrides, told_in_one_line
from latentdiff.learning.config import ModelRunConfig, load_config
from latentdiff.learning.denoising import Conditioned, draw_times
from latentdiff.learning.distillation import (
    Levels,
    TeacherSolver,
    consistency,
    consistency_levels,
    consistency_loss,
    draw_scales,
    guided,
    noised,
    progressive_target,
    teacher_step,
    with_guidance_input,
)
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.methods import without_lora
from latentdiff.learning.order import Key, columns, spread_uniform
from latentdiff.learning.results import LORA_FILE, save_model
from latentdiff.learning.run import Run
from latentdiff.learning.sample_grid import record_samples
from latentdiff.learning.trained import Trained, averages
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.models.text_encoders import TextStates
from latentdiff.pipeline import Request

Scale = Annotated[float, Field(ge=1.0, le=30.0)]


class DistillConfig(ModelRunConfig):
    """Settings of a distillation.

    Attributes:
        guidance: the student is told scales from the first to the second; a LoRA only one.
        teacher_steps: steps of the teacher's whole run: those that consistency goes by, and those
            that progressive distillation begins with.
        teacher_solver: what consistency follows the teacher with.
        steps: the steps that the student shall draw in; where progressive distillation ends. Of no
            effect on the method guided, whose student takes as many as its teacher.
        lora: rank of a LoRA to learn in place of all weights.
    """

    method: Literal["guided", "progressive", "consistency", "consistency-training"] = "consistency"
    guidance: tuple[Scale, Scale] = (1.0, 10.0)
    teacher_steps: PositiveInt = 50
    teacher_solver: TeacherSolver = "ddim"
    steps: PositiveInt = 4
    lora: PositiveInt | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.guidance
        if low > high:
            raise ValueError(f"guidance: {low:g} lies above {high:g}; the lower scale comes first")
        if self.lora is not None and low != high:
            raise ValueError(
                f"guidance: a LoRA cannot be told a scale, so give one twice: [{high:g}, {high:g}]"
            )
        if self.method == "progressive":
            if self.lora is not None:
                raise ValueError("lora: progressive distillation trains all weights; leave it out")
            if self.rounds < 1 or self.steps << self.rounds != self.teacher_steps:
                raise ValueError(
                    f"teacher_steps: {self.teacher_steps} does not halve to {self.steps} steps; "
                    f"{self.steps * 8} does"
                )
        return self

    @property
    def rounds(self) -> int:
        """How often the steps are halved."""
        return int(math.log2(max(1.0, self.teacher_steps / self.steps)))


def main(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Distil a model into one of few steps; re-run the same command to resume."""
    with told_in_one_line():
        train(load_config(DistillConfig, config, overrides or []), dry_run)


def train(config: DistillConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    with Run(config, dry) as run:
        fit(run, Distillation(config, run))


class Distillation(Objective[Key]):
    """A student that learns the answers of a teacher, which in the end may be itself."""

    def __init__(self, config: DistillConfig, run: Run) -> None:
        self.config, self.run = config, run
        teacher = Bundle.load(config.model, dtype="float32", device=run.device)
        check_teacher(teacher, config)
        self.teacher, self.round = teacher, 0
        told = teacher.network.guidance_width is not None
        self.former = Conditioned(teacher) if told else None
        self.pictures = CaptionedLatents(teacher, config.data, run)
        self.examples, self.order = self.pictures.examples, self.pictures.order
        with torch.no_grad():
            self.nothing = teacher.conditioner.states(teacher.conditioner.tokenize([""]))
        for network in teacher.modules.values():
            network.requires_grad_(False)
        self.student = student = make_student(teacher, config)
        module = Conditioned(student)
        self.shown = run.shown(student, module)
        self.model = Trained("model", module, config.optim)
        self.trained = [self.model]

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        config = self.config
        step, places, samples = columns(items)
        at = config.seed, step, places
        latents, (noise,), words = self.pictures.draw(step, places, samples, 1)
        scales = draw_scales(*at, config.guidance)
        here, middle, there = self.levels(spread_uniform(*at, config.optim.batch_size))
        x = noised(latents, noise, here)

        def student(x: Tensor, level: Levels) -> Tensor:
            return self.estimate(self.model.network, x, level, words, scales)

        def teacher(x: Tensor, level: Levels) -> Tensor:
            with without_lora(self.teacher.network.module), self.run.accelerator.autocast():
                if self.former is not None:
                    return self.estimate(self.former, x, level, words, scales)
                return self.guided_teacher(x, level, words, scales)

        if config.method in ("guided", "progressive"):
            with torch.no_grad():
                if config.method == "guided":
                    target = teacher(x, here)
                else:
                    target = progressive_target(teacher, x, here, middle, there)
            # Salimans & Ho 2022, section 4: the truncated SNR weights the error of x_0.
            weights = here.snr.clamp(min=1).float()
            errors = (student(x, here) - target).square().flatten(1).mean(1)
            return {"loss": (weights * errors).mean()}
        with torch.no_grad():
            if config.method == "consistency":
                after = teacher_step(teacher, x, here, there, config.teacher_solver)
            else:
                after = noised(latents, noise, there)
            # The student itself, without an average: Song & Dhariwal 2023 (iCT), section 3.2.
            target = consistency(after, student(after, there), there)
        found = consistency(x, student(x, here), here)
        return {"loss": consistency_loss(found, target, here)}

    def levels(self, uniform: Tensor) -> tuple[Levels, Levels, Levels]:
        """The level of each picture [B], and the first and the last that its teacher goes to."""
        process, count = self.teacher.process, self.config.teacher_steps
        if self.config.method == "guided":
            times = draw_times(process, uniform, "uniform").tolist()
            here = Levels.of([process.level(time) for time in times], self.run.device)
            return here, here, here
        if self.config.method == "progressive":
            count >>= self.round
            table, moves = timetable.create("trailing", process, count), 2
        else:
            table, moves = consistency_levels(process, count), 1
        starts = (moves * (uniform * (count // moves)).floor()).int().tolist()

        def after(some: int) -> Levels:
            return Levels.of([table[start + some] for start in starts], self.run.device)

        return after(0), after(1), after(moves)

    def estimate(
        self,
        network: torch.nn.Module,
        x: Tensor,
        level: Levels,
        words: TextStates,
        scales: Sequence[float],
    ) -> Tensor:
        """x_0 as a network tells it that is told its guidance scale, or is a LoRA of one scale."""
        output = network(self.scaled(x, level), level.t.float(), words, None, scales)
        output = output[:, : x.shape[1]].float()
        return to_x0(self.teacher.prediction, output, x, level.alpha, level.sigma)

    def guided_teacher(
        self, x: Tensor, level: Levels, words: TextStates, scales: Sequence[float]
    ) -> Tensor:
        """x_0 of the guided teacher, whose two calls go through its network as one batch."""
        teacher = self.teacher
        size = x.shape[-2] * teacher.factor, x.shape[-1] * teacher.factor
        positive = teacher.conditioner.condition(words, size)
        nothing = teacher.conditioner.condition(self.nothing, size).take([0] * len(x))
        twice = self.scaled(x, level).repeat(2, 1, 1, 1), level.t.float().repeat(2)
        output = teacher.network(*twice, joined([nothing, positive]))[:, : x.shape[1]].float()
        away, towards = (
            to_x0(teacher.prediction, part, x, level.alpha, level.sigma) for part in output.chunk(2)
        )
        return guided(towards, away, torch.tensor(scales, device=x.device))

    def scaled(self, x: Tensor, level: Levels) -> Tensor:
        """x_t as the network sees it."""
        scale = self.teacher.process.input_scale(level.alpha, level.sigma)
        return (scale * x).to(x)

    def after_step(self, step: int, values: dict[str, Tensor]) -> None:
        """In progressive distillation, have the student teach the next round."""
        rounds = self.config.rounds
        due = min((step + 1) * rounds // self.config.optim.steps, rounds - 1)
        if self.config.method == "progressive" and due > self.round:
            self.round = due
            self.run.say(f"step {step + 1}: the student of {self.present_steps * 2} steps teaches")
            with averages(self.trained):
                self.former = copied(self.student)

    @property
    def present_steps(self) -> int:
        """The steps that the student is learning to draw in; guided, those of any model."""
        if self.config.method == "progressive":
            return self.config.teacher_steps >> (self.round + 1)
        return Request.num_inference_steps if self.config.method == "guided" else self.config.steps

    def state(self) -> tuple[dict[str, Tensors], dict[str, object]]:
        if not self.round or self.former is None:
            return {}, {"round": 0}
        return {"teacher": self.former.unet.state_dict()}, {"round": self.round}

    def load_state(self, tensors: dict[str, Tensors], values: dict[str, object]) -> None:
        self.round = int(str(values["round"]))
        if self.round:
            self.former = copied(self.student)
            self.former.unet.load_state_dict(tensors["teacher"])

    def evaluate(self, step: int) -> None:
        """A grid of pictures in few steps, for the configured prompts or the first captions."""
        run, config, steps = self.run, self.config, self.present_steps
        scale = drawn_scale(self.student, config)
        record_samples(run, step, self.shown, config, self.examples, steps=steps, scale=scale)

    def finish(self) -> None:
        """Write the model's folder or the LoRA's file, with its card."""
        run, config = self.run, self.config
        scale = drawn_scale(self.student, config)
        options = f"--steps {self.present_steps} --guidance-scale {scale:g}"
        with self.shown.whole() as bundle:
            if not run.main:
                return
            if config.lora is None:
                save_model(run, bundle, config, self.examples, options)
                return
            path = save_lora(
                lora_of(bundle), config.out / LORA_FILE, dtype=getattr(torch, config.save_dtype)
            )
            described = bundle.process, bundle.prediction, self.student.steps, self.student.solver
            schedule = scheduler_config.write(*described)
            write_json(config.out / "scheduler_config.json", schedule, replace=True)
        base = "" if config.model is None else f" --model {quote(config.model)}"
        if self.student.solver != self.teacher.solver:
            base += f" --solver {self.student.solver} --timetable trailing"
        run.say(
            f"wrote {path}", f'latentdiff generate "..." --lora {quote(str(path))}{base} {options}'
        )
        outcome = Outcome(config.out, "lora", config.model, self.examples, config.data.root)
        run.say(*share(outcome, config))


def drawn_scale(student: Bundle, config: DistillConfig) -> float:
    """The guidance scale to draw with: the middle of those learned, where the student is told one;
    otherwise it is in its LoRA, and 1 is off."""
    return 1.0 if student.network.guidance_width is None else sum(config.guidance) / 2


def check_teacher(teacher: Bundle, config: DistillConfig) -> None:
    """Pass if the model can be distilled so.

    Raises:
        UserError: it is told a picture, or its times or its sizes do not fit the method.
    """
    if teacher.kind != "text-to-image":
        raise UserError(f"{teacher.name} is an {teacher.kind} model, which is not distilled here")
    if teacher.network.noise_width is not None:
        raise UserError(f"{teacher.name} is a generator of few steps, which is not distilled here")
    check_size(config.data.size, teacher)
    if not config.method.startswith("consistency"):
        return
    process = teacher.process
    if not isinstance(process, DiscreteVP):
        raise UserError(
            f"method: {config.method} is for models of whole times; {teacher.name} has none: take "
            "guided or progressive"
        )
    if config.teacher_steps > process.num_train_timesteps:
        raise UserError(
            f"teacher_steps: {teacher.name} has {process.num_train_timesteps} times, fewer than "
            f"{config.teacher_steps}"
        )
    if config.teacher_solver == "heun" and process.level(process.t_max).alpha == 0:
        raise UserError("teacher_solver: heun cannot begin at pure noise, as this model does: ddim")


def make_student(teacher: Bundle, config: DistillConfig) -> Bundle:
    """The model that learns, with the solver and the timetable that it is to draw with."""
    student = teacher
    if config.method == "progressive":
        student = replace(teacher, solver="ddim", steps=Steps())
    elif config.method.startswith("consistency"):
        steps = Steps("leading", within="leading", teacher_steps=config.teacher_steps)
        student = replace(teacher, solver="lcm", steps=steps)
    if config.lora is not None:
        add_lora(student, rank=config.lora, targets="all", seed=config.seed)
        return student
    student = with_guidance_input(replace(student, network=copy.deepcopy(student.network)))
    student.network.module.requires_grad_(True)
    return student


def copied(student: Bundle) -> Conditioned:
    """The student as it is, to teach: it learns no more."""
    network = copy.deepcopy(student.network)
    network.module.requires_grad_(False)
    return Conditioned(replace(student, network=network))


if __name__ == "__main__":
    typer.run(main)
