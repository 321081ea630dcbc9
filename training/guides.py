"""Train a real part for guidance: a classifier of noised latents, or a small CLIP.

    accelerate launch training/guides.py --config training/configs/emoji64-classifier.yaml
    accelerate launch training/guides.py --config training/configs/emoji64-clip.yaml

Both learn from the captioned picture folder of the other stages, and are measured on held-out
pictures. Ends by writing `OUT/model`, which `ClassifierGuide` and `ClipGuide` open. Run the same
command again to resume.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
import typer
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from latentdiff.bundle import Bundle
from latentdiff.data.examples import Example
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.errors import UserError
from latentdiff.formats.check import latent_affine
from latentdiff.guidance.classifier import Classifier
from latentdiff.guidance.clip import Clip
from latentdiff.learning.batches import (
    Key,
    PictureSet,
    encode_pictures,
    sample_order,
    split_examples,
    to_range,
)
from latentdiff.learning.captions import Captions
from latentdiff.learning.checkpoint import pack_optimizer, unpack_optimizer
from latentdiff.learning.config import DataConfig, RunConfig, Strict, load_config
from latentdiff.learning.denoising import draw_times
from latentdiff.learning.ema import EMA
from latentdiff.learning.losses import contrastive
from latentdiff.learning.order import Shares, generator, sample_noise, spread_uniform
from latentdiff.learning.run import Run, adamw, learning_rate
from latentdiff.models.classifier import LatentClassifier
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


def split(config: GuidesConfig) -> tuple[list[Example], list[Example]]:
    """Pictures to learn from, and others to be measured on.

    Raises:
        UserError: there are none of either.
    """
    train, held_out = split_examples(config.data)
    if not held_out:
        raise UserError("no picture is held out to measure on: set data.held_out")
    return train, held_out


class Task(Protocol):
    """What is trained, on what loss, and how good it is."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def train(self) -> list[Example]: ...

    @property
    def held_out(self) -> list[Example]: ...

    def loss(self, wrapped: nn.Module, keys: Sequence[Key]) -> Tensor:
        """Of a micro-batch, a function of its keys and the weights."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Of the held-out pictures."""
        ...

    def save(self, folder: Path, dtype: torch.dtype) -> None: ...


class LatentLabels:
    """Which label a picture has, from its latents at any noise."""

    def __init__(self, run: Run, config: GuidesConfig, task: ClassifierTask) -> None:
        self.config, self.run = config, run
        self.train, self.held_out = split(config)
        bundle = Bundle.load(task.model, device=run.device, dtype="float32")
        self.process = bundle.process
        self.affine = latent_affine(bundle.vae)
        self.field = task.label
        labels = sorted({self.name(example) for example in self.train})
        self.held_out = [e for e in self.held_out if self.name(e) in labels]
        self.answers, self.held_answers = (
            torch.tensor([labels.index(self.name(example)) for example in part])
            for part in (self.train, self.held_out)
        )
        size, folder = config.data.size, config.out / "cache"
        self.moments, self.held_moments = (
            encode_pictures(bundle.vae, part, size, folder, run.accelerator)
            for part in (self.train, self.held_out)
        )
        torch.manual_seed(config.seed)  # the initial weights
        self.module = LatentClassifier(bundle.latent_channels, labels, task.width)

    def name(self, example: Example) -> str:
        """The label of a picture.

        Raises:
            UserError: it has none.
        """
        if not example.fields.get(self.field):
            raise UserError(f"{example.path}: it has no field '{self.field}' to be told by.")
        return str(example.fields[self.field])

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draws of the posterior, as the denoiser sees latents."""
        gain, offset = self.affine
        mean, std = moments.chunk(2, 1)
        return (mean + std * noise - offset) / gain

    def loss(self, wrapped: nn.Module, keys: Sequence[Key]) -> Tensor:
        step, config = keys[0][0], self.config
        places = [place for _, place, _ in keys]
        samples = [sample for _, _, sample in keys]
        shape = (self.module.latent_channels, *self.moments.shape[2:])
        posterior, noise = sample_noise(config.seed, step, places, shape, 2)
        uniform = spread_uniform(config.seed, step, places, config.optim.batch_size)
        alpha, sigma = self.process.alpha_sigma(draw_times(self.process, uniform, "uniform"))
        latents = self.latents(self.moments[samples], posterior)
        logits = self.logits(wrapped, latents, noise, alpha, sigma)
        return F.cross_entropy(logits.float(), self.answers[samples].to(logits.device))

    def logits(
        self, network: nn.Module, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        """Of noised latents at unit power; alpha and sigma [B] are float64."""
        power = (alpha**2 + sigma**2).sqrt()
        a, s = ((part / power).float().view(-1, 1, 1, 1) for part in (alpha, sigma))
        log_snr = 2 * (alpha.log() - sigma.log())
        device = self.run.device
        return network((a * latents + s * noise).to(device), log_snr.float().to(device))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy of the held-out pictures at five times of the process."""
        count, (channels, *size) = len(self.held_out), self.held_moments.shape[1:]
        shape, found = (channels // 2, *size), {}
        noise = sample_noise(self.config.seed, 0, list(range(count)), shape, 1)[0]
        latents = self.latents(self.held_moments, torch.zeros_like(noise))
        for part in (0.0, 0.25, 0.5, 0.75, 1.0):
            level: NoiseLevel = self.process.level(
                self.process.t_min + part * (self.process.t_max - self.process.t_min)
            )
            levels = torch.full((2, count), level.alpha, dtype=torch.float64)
            levels[1] = level.sigma
            guess = self.logits(self.module, latents, noise, *levels).argmax(1).cpu()
            found[f"accuracy/t={part:g}"] = float((guess == self.held_answers).float().mean())
        return found

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        Classifier(self.module).save(folder, dtype)


class PicturesAndTexts:
    """Which caption belongs to which picture."""

    def __init__(self, run: Run, config: GuidesConfig, task: ClipTask) -> None:
        if config.optim.accumulation != 1:
            raise UserError("a CLIP learns from all pairs of a batch: set optim.accumulation: 1")
        if run.accelerator.num_processes > 1:
            raise UserError("a CLIP learns from all pairs of a batch: launch it as one process")
        self.config, self.run, self.task = config, run, task
        self.train, self.held_out = split(config)
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
        self.clip = Clip(model, tokenizer)
        self.captions = Captions(ClipTower(model.text_model, tokenizer), captions, 0.0, config.seed)
        self.module = PairNetwork(self.clip)

    def loss(self, wrapped: nn.Module, keys: Sequence[Key]) -> Tensor:
        step = keys[0][0]
        places = [place for _, place, _ in keys]
        samples = [sample for _, _, sample in keys]
        pictures = to_range(torch.stack([self.pictures.load(sample) for sample in samples]))
        pictures = self.disturbed(pictures, step, places).to(self.run.device)
        ids = self.captions.tokens(step, places, samples).ids.to(self.run.device)
        return contrastive(*wrapped(pictures, ids))

    def disturbed(self, pictures: Tensor, step: int, places: Sequence[int]) -> Tensor:
        """Shifted on white and noised, so that a gradient shows shapes and not single pixels."""
        seed, side, most = self.config.seed, pictures.shape[-1], self.task.shift
        padded = F.pad(pictures, (most,) * 4, value=1.0)
        rows: list[Tensor] = []
        for picture, place in zip(padded, places, strict=True):
            random = generator(seed, 5, step, place)
            top, left = random.integers(2 * most + 1, size=2)
            moved = picture[:, top : top + side, left : left + side]
            noise = torch.from_numpy(random.standard_normal(moved.shape, dtype="float32"))
            rows.append(moved + self.task.noise * random.random() * noise)
        return torch.stack(rows)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How often the own caption, or picture, is the first or among the first five."""
        load = self.held_pictures.load
        every = torch.stack([load(number) for number in range(len(self.held_out))])
        pictures = torch.cat(
            [self.clip.pictures(to_range(part).to(self.run.device)) for part in every.split(64)]
        )
        texts = self.clip.texts([example.captions[0] for example in self.held_out])
        logits = pictures @ texts.T
        found: dict[str, float] = {}
        for name, part in (("text", logits), ("picture", logits.T)):
            rank = (part > part.diagonal()[:, None]).sum(1)
            found[f"{name}/first"] = float((rank < 1).float().mean())
            found[f"{name}/first five"] = float((rank < 5).float().mean())
        return found

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        self.clip.save(folder, dtype)


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


def main(
    config: Annotated[Path, typer.Option(help="YAML file, see training/configs.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value changes, as optim.steps=2000.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read all data, one step, one save, then stop.")
    ] = False,
) -> None:
    """Train a classifier of noised latents, or a small CLIP; re-run the same command to resume."""
    try:
        train(load_config(GuidesConfig, config, overrides or []), dry_run)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def train(config: GuidesConfig, dry: bool) -> None:
    """One run in the folder `config.out`."""
    with Run(config, dry, may_shrink=config.task.kind != "clip") as run:
        if isinstance(config.task, ClassifierTask):
            fit(config, run, LatentLabels(run, config, config.task))
        else:
            fit(config, run, PicturesAndTexts(run, config, config.task))


def fit(config: GuidesConfig, run: Run, task: Task) -> None:
    """Prepare -> loop -> save."""
    optim, module = config.optim, task.module
    run.say(f"{len(task.train)} pictures for training, {len(task.held_out)} held out")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = adamw(iter(trained), optim)
    start = 0
    if found := run.resume():
        tensors, state = found
        module.load_state_dict(tensors["model"])
        unpack_optimizer(optimizer, tensors["optimizer"])
        start = int(str(state["step"]))
    wrapped, optimizer = run.accelerator.prepare(module, optimizer)
    ema = EMA(module, optim.ema_decay)
    if found:
        tensors, state = found
        ema.load_state_dict(tensors["ema"], int(str(state["ema_updates"])))
        del found, tensors

    def save(step: int) -> None:
        tensors = {
            "model": module.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": pack_optimizer(optimizer),
        }
        run.save(step, tensors, {"ema_updates": ema.updates})

    stop = min(start + 1, optim.steps) if run.dry else optim.steps
    shares = Shares(
        sample_order(task.train, config.data, config.seed),
        range(start, stop),
        optim.batch_size,
        run.accelerator.process_index,
        run.accelerator.num_processes,
    )

    def terms(keys: Sequence[Key]) -> dict[str, Tensor]:
        return {"loss": task.loss(wrapped, keys)}

    with run.signals(), run.bar(start, stop) as bar:
        for keys in shares:
            rate = learning_rate(optim, keys[0][0])
            values = run.gradients([wrapped], trained, keys, terms)
            if run.optimize(rate, (optimizer, trained)):
                ema.update()

            bar.update()
            done = keys[0][0] + 1
            if done % config.log_every == 0 or done == stop:
                loss = values["loss"].item()
                run.record(done, {"loss": loss, "lr": rate})
                bar.set_postfix({"loss": f"{loss:.4f}", "bad": run.bad_steps})
            if done % config.evaluate_every == 0 or done == stop:
                with ema.applied():
                    found = task.evaluate()
                run.record(done, found)
                run.say(f"step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
            stopping = run.stopping
            if done % config.checkpoint_every == 0 or done == stop or stopping:
                save(done)
            if stopping:
                raise SystemExit(128 + stopping)

    if run.dry:
        run.say("dry run: data, one step and one save are fine")
    elif run.main:
        with ema.applied():
            task.save(config.out / "model", getattr(torch, config.save_dtype))
        run.say(f"wrote {config.out / 'model'}")


if __name__ == "__main__":
    typer.run(main)
