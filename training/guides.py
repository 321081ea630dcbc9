"""Train a real part for guidance: a classifier of noised latents, or a small CLIP.

    accelerate launch training/guides.py --config training/configs/emoji64-classifier.yaml
    accelerate launch training/guides.py --config training/configs/emoji64-clip.yaml

Both learn from the captioned picture folder of the other stages, and are measured on held-out
pictures. Ends by writing `OUT/model`, which `ClassifierGuide` and `ClipGuide` open. Run the same
command again to resume.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import typer
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.clip import Clip
from latentdiff.learning.batches import (
    PictureSet,
    encode_pictures,
    sample_order,
    split_examples,
    to_range,
)
from latentdiff.learning.captions import Captions
from latentdiff.learning.command import ConfigFile, DryRun, Overrides, told_in_one_line
from latentdiff.learning.config import DataConfig, RunConfig, Strict, load_config
from latentdiff.learning.denoising import draw_times
from latentdiff.learning.loop import Objective, fit
from latentdiff.learning.losses import contrastive
from latentdiff.learning.order import Key, Stream, columns, generator, sample_noise, spread_uniform
from latentdiff.learning.run import Run
from latentdiff.learning.trained import Trained
from latentdiff.models.classifier import LatentClassifier
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.fresh_clip import build_clip
from latentdiff.models.fresh_text import train_tokenizer
from latentdiff.models.text_encoders import ClipTower


class ClassifierTask(Strict):
    """`model`: whose latents (null: the bundled model's); `label`: the field to tell."""

    kind: Literal["classifier"]
    model: Path | None = None
    label: str = "group"
    width: PositiveInt = 64


class ClipTask(Strict):
    """`shift` in pixels and `noise`, in [-1, 1], are the most that a picture is disturbed by."""

    kind: Literal["clip"]
    patch: PositiveInt = 8
    width: PositiveInt = 128
    layers: PositiveInt = 4
    text_layers: PositiveInt = 2
    heads: PositiveInt = 4
    vocabulary: PositiveInt = 2048
    window: PositiveInt = 24
    shift: int = Field(default=4, ge=0)
    noise: float = Field(default=0.3, ge=0)


class GuidesConfig(RunConfig):
    data: DataConfig
    task: ClassifierTask | ClipTask = Field(discriminator="kind")
    save_dtype: Literal["float32", "float16"] = "float16"


class Guide(Objective[Key]):
    """Base of both objectives: held-out pictures to evaluate on, and a folder for the result."""

    result: Classifier | Clip

    def __init__(self, run: Run, config: GuidesConfig) -> None:
        self.config, self.run = config, run
        self.train, self.held_out = split_examples(config.data)
        if not self.held_out:
            raise UserError("no picture is held out to measure on: set data.held_out")
        self.order = sample_order(self.train, config.data, config.seed)

    def learn(self, module: nn.Module) -> None:
        """Have the weights of the module learn."""
        self.run.say(f"{len(self.train)} pictures for training, {len(self.held_out)} held out")
        self.model = Trained("model", module, self.config.optim)
        self.trained = [self.model]

    def finish(self) -> None:
        folder = self.run.out / "model"
        if self.run.main:
            self.result.save(folder, getattr(torch, self.config.save_dtype))
            self.run.say(f"wrote {folder}")


class LatentLabels(Guide):
    """Objective of the classifier: predict a picture's label from its latents at any noise."""

    def __init__(self, run: Run, config: GuidesConfig, task: ClassifierTask) -> None:
        super().__init__(run, config)
        bundle = Bundle.load(task.model, device=run.device, dtype="float32")
        self.process = bundle.process
        self.autoencoder = bundle.autoencoder
        self.field = task.label
        labels = sorted({self.name(example) for example in self.train})
        self.held_out = [e for e in self.held_out if self.name(e) in labels]
        self.answers, self.held_answers = (
            torch.tensor([labels.index(self.name(example)) for example in part])
            for part in (self.train, self.held_out)
        )
        size, folder = config.data.size, config.data.latents or config.out / "cache"
        self.moments, self.held_moments = (
            encode_pictures(bundle.autoencoder, part, size, folder, run.accelerator)
            for part in (self.train, self.held_out)
        )
        torch.manual_seed(config.seed)  # the initial weights
        self.classifier = LatentClassifier(bundle.latent_channels, labels, task.width)
        self.result = Classifier(self.classifier)
        self.learn(self.classifier)

    def name(self, example: Example) -> str:
        """The label of a picture.

        Raises:
            UserError: the picture has no label.
        """
        if not example.fields.get(self.field):
            raise UserError(f"{example.path}: it has no field '{self.field}' to be told by.")
        return str(example.fields[self.field])

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        step, places, samples = columns(items)
        at, shape = (self.config.seed, step, places), self.moments.shape
        posterior, noise = sample_noise(*at, (shape[1] // 2, *shape[2:]), 2)
        uniform = spread_uniform(*at, self.config.optim.batch_size)
        alpha, sigma = self.process.alpha_sigma(draw_times(self.process, uniform, "uniform"))
        latents = self.autoencoder.draw(self.moments[samples], posterior)
        logits = self.logits(self.model.network, latents, noise, alpha, sigma)
        answers = self.answers[samples].to(logits.device)
        return {"loss": F.cross_entropy(logits.float(), answers)}

    def logits(
        self, network: nn.Module, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        """Classify latents, noised and scaled to unit power; alpha and sigma [B] are float64."""
        power = (alpha**2 + sigma**2).sqrt()
        a, s = ((part / power).float().view(-1, 1, 1, 1) for part in (alpha, sigma))
        log_snr = 2 * (alpha.log() - sigma.log())
        device = self.run.device
        return network((a * latents + s * noise).to(device), log_snr.float().to(device))

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy of the held-out pictures at five times of the process."""
        count, (channels, *size) = len(self.held_out), self.held_moments.shape[1:]
        shape, found = (channels // 2, *size), {}
        noise = sample_noise(self.config.seed, 0, list(range(count)), shape, 1)[0]
        latents = self.autoencoder.draw(self.held_moments, torch.zeros_like(noise))
        for part in (0.0, 0.25, 0.5, 0.75, 1.0):
            level: NoiseLevel = self.process.level(
                self.process.t_min + part * (self.process.t_max - self.process.t_min)
            )
            levels = torch.full((2, count), level.alpha, dtype=torch.float64)
            levels[1] = level.sigma
            guess = self.logits(self.classifier, latents, noise, *levels).argmax(1).cpu()
            found[f"accuracy/t={part:g}"] = float((guess == self.held_answers).float().mean())
        return found


class PicturesAndTexts(Guide):
    """Objective of the CLIP: match pictures and captions by a contrastive loss."""

    def __init__(self, run: Run, config: GuidesConfig, task: ClipTask) -> None:
        if config.optim.accumulation != 1:
            raise UserError("a CLIP learns from all pairs of a batch: set optim.accumulation: 1")
        if run.accelerator.num_processes > 1:
            raise UserError("a CLIP learns from all pairs of a batch: launch it as one process")
        super().__init__(run, config)
        self.task = task
        self.pictures, self.held_pictures = (
            PictureSet(part, config.data.size) for part in (self.train, self.held_out)
        )
        captions = [example.captions for example in self.train]
        words = sorted({caption for own in captions for caption in own})
        tokenizer = train_tokenizer(words, task.vocabulary, task.window)
        torch.manual_seed(config.seed)  # the initial weights
        model = build_clip(
            tokenizer,
            image_size=config.data.size,
            patch=task.patch,
            width=task.width,
            layers=task.layers,
            text_layers=task.text_layers,
            heads=task.heads,
        )
        self.clip = self.result = Clip(model, tokenizer)
        conditioner = TextConditioner(ClipTower(model.text_model, tokenizer))
        self.captions = Captions(conditioner, captions, 0.0, config.seed)
        self.learn(PairNetwork(self.clip))

    def terms(self, items: Sequence[Key]) -> dict[str, Tensor]:
        step, places, samples = columns(items)
        pictures = to_range(torch.stack([self.pictures.load(sample) for sample in samples]))
        pictures = self.disturbed(pictures, step, places).to(self.run.device)
        ids = self.captions.tokens(step, places, samples).ids.to(self.run.device)
        return {"loss": contrastive(*self.model.network(pictures, ids))}

    def disturbed(self, pictures: Tensor, step: int, places: Sequence[int]) -> Tensor:
        """Shifted on white and noised, so that a gradient shows shapes and not single pixels."""
        seed, side, most = self.config.seed, pictures.shape[-1], self.task.shift
        padded = F.pad(pictures, (most,) * 4, value=1.0)
        rows: list[Tensor] = []
        for picture, place in zip(padded, places, strict=True):
            random = generator(seed, Stream.DISTURBANCE, step, place)
            top, left = random.integers(2 * most + 1, size=2)
            moved = picture[:, top : top + side, left : left + side]
            noise = torch.from_numpy(random.standard_normal(moved.shape, dtype="float32"))
            rows.append(moved + self.task.noise * random.random() * noise)
        return torch.stack(rows)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Measure top-1 and top-5 accuracy of retrieval, from pictures to texts and back."""
        parts = self.held_pictures.parts(64)
        pictures = torch.cat([self.clip.pictures(part.to(self.run.device)) for part in parts])
        texts = self.clip.texts([example.captions[0] for example in self.held_out])
        logits = pictures @ texts.T
        found: dict[str, float] = {}
        for name, part in (("text", logits), ("picture", logits.T)):
            rank = (part > part.diagonal()[:, None]).sum(1)
            found[f"{name}/first"] = float((rank < 1).float().mean())
            found[f"{name}/first five"] = float((rank < 5).float().mean())
        return found


class PairNetwork(nn.Module):
    """Both towers as one pass, so that Accelerate can wrap it."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.model = clip.model
        self._clip = (clip,)  # in a tuple: its network is registered once

    def forward(self, pictures: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, S, S] in [-1, 1] and ids [B, L] -> unit vectors and the temperature."""
        (clip,) = self._clip
        # Radford et al. 2021, sec. 2.5: the temperature is learned, but not beyond 100.
        temperature = self.model.logit_scale.exp().clamp(max=100.0)
        return clip.pictures(pictures), clip.embed(ids), temperature


def main(config: ConfigFile, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a classifier of noised latents, or a small CLIP; re-run the same command to resume."""
    with told_in_one_line():
        train(load_config(GuidesConfig, config, overrides or []), dry_run)


def train(config: GuidesConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    with Run(config, dry, may_shrink=config.task.kind != "clip") as run:
        if isinstance(config.task, ClassifierTask):
            fit(run, LatentLabels(run, config, config.task))
        else:
            fit(run, PicturesAndTexts(run, config, config.task))


if __name__ == "__main__":
    typer.run(main)
