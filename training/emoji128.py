"""A 128-pixel emoji model on one large GPU in under ten minutes: both stages.

    python training/emoji128.py --data data/emoji128 --text runs/emoji128-text --out runs/emoji128
    python training/emoji128.py --data data/emoji128 --start assets/emoji128 --out runs/emoji128

The second goes on from the weights of a model that it made. Processes compose pictures while
stage 1 trains; all pictures are then encoded once and stage 2 trains on their latents. Each phase
ends at its share of `--seconds`, and learning rates fall with the time that is gone, so a slower
machine gets fewer steps and not a later end. What is random in a step is a function of (seed,
step); how many steps there are is not. `--seconds 60 --tiny` tries all of it on a CPU.
"""

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff.bundle import Bundle
from latentdiff.data.captions import with_article
from latentdiff.data.composition import Composer, Thing, plain_captions, read_rows
from latentdiff.data.held_out import SYNONYMS
from latentdiff.data.pool import BLOCK, Pool, read_all
from latentdiff.data.wordnet import WordNet
from latentdiff.diffusion import process as processes
from latentdiff.diffusion.process import DiscreteVP
from latentdiff.files import make_folder, write_json
from latentdiff.formats.weights import save_tensors
from latentdiff.learning.ema import EMA
from latentdiff.learning.teaching import (
    Batch,
    Book,
    Taught,
    batch_of,
    lessons,
    teaching_loss,
)
from latentdiff.metrics.perceptual import random_features
from latentdiff.metrics.psnr import psnr
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.clip_text import ClipTextConfig, ClipTextEncoder
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.network import DiffusersUNet
from latentdiff.models.text_encoders import ClipTower
from latentdiff.models.unet import build_unet
from latentdiff.models.vae import Autoencoding, build_vae, standardise_latents
from latentdiff.random_numbers import philox

CAPTIONS = 32  # of each plain picture


@dataclass(frozen=True)
class Recipe:
    """Settings of the two stages.

    Attributes:
        vae_channels: from the full resolution down to an eighth-sixteenth.
        text_takes: how long the tower is taught before stage 1, as a share of all time.
        vae_ends, diffusion_ends: when the two stages end, as shares of all time.
        plain: share of plain pictures in a batch of stage 2.
        text_rate: the learning rate of the tower's upper layers, in that of the U-Net.
        anchor: weight of the loss that keeps the tower's meaning.
    """

    size: int = 128
    text_takes: float = 0.035
    text_batch: int = 1024
    text_teaching_rate: float = 6e-4
    vae_channels: tuple[int, ...] = (16, 32, 64, 128, 160)
    latent_channels: int = 32
    vae_batch: int = 128
    vae_rate: float = 1.2e-3
    squared: float = 4.0
    perceptual: float = 0.05
    kl: float = 1e-5
    equivariance: float = 0.1
    vae_ends: float = 0.35
    unet_channels: tuple[int, ...] = (128, 256)
    head_dim: int = 64
    process: str = "vp-cosine"
    batch: int = 1024
    rate: float = 1.0e-3
    text_rate: float = 0.3
    trained_layers: int = 2
    anchor: float = 1.0
    caption_dropout: float = 0.1
    plain: float = 0.6
    diffusion_ends: float = 0.91
    composed: int = 600_000
    ema: float = 0.999
    ema_every: int = 5
    workers: int = 14
    seed: int = 0


TINY = Recipe(
    text_batch=16,
    vae_channels=(8, 8, 8, 16, 16), vae_batch=4, unet_channels=(32, 64), head_dim=32, batch=8,
    composed=1024, workers=1,
)  # fmt: skip


@dataclass
class Clock:
    """Time since the start, and what was said at which second."""

    seconds: float
    start: float = field(default_factory=time.monotonic)
    notes: dict[str, object] = field(default_factory=dict)

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def share(self, begin: float, end: float) -> float:
        """Share of the time between two seconds that is over, in [0, 1]; it is a second at least,
        so that a phase that begins late still learns."""
        return min(1.0, max(0.0, (self.gone - begin) / max(1.0, end - begin)))

    def say(self, text: str, **numbers: object) -> None:
        """Print a line with the time, and keep its numbers."""
        self.notes |= numbers
        print(f"[{self.gone:6.1f} s] {text}", flush=True)


@dataclass(frozen=True)
class Machine:
    """Device of the tensors, and the settings that make steps fast on it."""

    device: torch.device
    compile: bool
    graphs: bool

    def autocast(self) -> torch.autocast:
        """bfloat16 where a product may be in it."""
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def wait(self, step: int) -> None:
        """Let the GPU come up now and then, so that the time is that of the work done."""
        if self.device.type == "cuda" and step % 8 == 0:
            torch.cuda.synchronize()

    def compiled(self, module: Any) -> Any:
        """The module, compiled if that is asked for; its parameters stay the same."""
        if not self.compile:
            return module
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        return torch.compile(module, dynamic=False)

    def memory(self) -> str:
        """The most memory that tensors have taken so far."""
        taken = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return f"{taken / 2**30:.1f} GiB"

    def adamw(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        """AdamW; on a GPU in one kernel and with its rate in a tensor, for a graph to read."""
        cuda = self.device.type == "cuda"
        for group in groups:
            group["lr"] = torch.tensor(0.0, device=self.device) if cuda else 0.0
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=cuda,
                                 capturable=cuda)  # fmt: skip


class Stepper:
    """One optimizer step, on a GPU recorded once and then replayed.

    Args:
        loss: from buffers that the caller fills, a scalar.
        scales: factor of the learning rate of each of the optimizer's groups.
    """

    def __init__(
        self, machine: Machine, loss: Callable[[], Tensor], optimizer: torch.optim.AdamW,
        scales: Sequence[float],
    ) -> None:  # fmt: skip
        self.machine, self.loss, self.optimizer, self.scales = machine, loss, optimizer, scales
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.value = torch.zeros(())
        self.side: Any = torch.cuda.Stream() if machine.graphs else None

    def _work(self) -> Tensor:
        value = self.loss()
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return value.detach()

    def step(self, rate: float) -> None:
        """Take a step at this learning rate; its loss is in `value`."""
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * scale)
            else:
                group["lr"] = rate * scale
        if self.graph is not None:
            self.graph.replay()
            return
        self.optimizer.zero_grad(set_to_none=True)
        if not self.machine.graphs:
            self.value = self._work()
            return
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):  # not the stream that later replays
            self.value = self._work()
        torch.cuda.current_stream().wait_stream(self.side)

    def record(self) -> None:
        """Record a step, after a few ordinary ones; takes none itself."""
        if not self.machine.graphs:
            return
        torch.cuda.synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.value = self._work()
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.optimizer.zero_grad(set_to_none=True)
            print(f"no graph: {str(error)[:300]}", flush=True)
            return
        self.graph = graph


def cosine(share: float, peak: float, warm: float = 0.03) -> float:
    """A learning rate that rises for the first share of the time and falls to 0 at its end."""
    return peak * min(share / warm, 0.5 + 0.5 * math.cos(math.pi * share))


def uneven(things: Sequence[Thing]) -> np.ndarray:
    """Probabilities that draw every (style, emoji) alike, [N]."""
    keys = [(thing.style, thing.base) for thing in things]
    counts: dict[tuple[str, str], int] = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    weights = np.array([1.0 / counts[key] for key in keys])
    return weights / weights.sum()


class Pictures:
    """Plain and composed pictures on the device, uint8 [N, H, W, 3]; composed ones come in time."""

    def __init__(
        self, plain: np.ndarray, pool: Pool, weights: np.ndarray, machine: Machine
    ) -> None:
        self.pool = pool
        self.device = machine.device
        self.plain = torch.from_numpy(plain).to(self.device)
        self.composed = torch.empty(pool.pictures.shape, dtype=torch.uint8, device=self.device)
        self.order: list[int] = []  # blocks in the order in which they came
        self.edges = torch.from_numpy(np.cumsum(weights)).to(self.device)

    def fetch(self, most: int = 64) -> None:
        """Copy blocks that were made since, at most so many."""
        known = set(self.order)
        new = [int(block) for block in self.pool.ready() if int(block) not in known][:most]
        for block in new:
            at = len(self.order) * BLOCK
            part = self.pool.pictures[block * BLOCK : (block + 1) * BLOCK]
            self.composed[at : at + BLOCK].copy_(torch.from_numpy(part))
            self.order.append(block)

    def tokens(self) -> Tensor:
        """Captions of the composed pictures that are here, int16 [M, window]."""
        blocks = self.pool.tokens.reshape(self.pool.blocks, BLOCK, -1)[self.order]
        return torch.from_numpy(blocks.reshape(-1, blocks.shape[-1])).to(self.device)

    def plain_rows(self, uniform: Tensor) -> Tensor:
        """Rows of plain pictures for uniform numbers, by their weights."""
        rows = torch.searchsorted(self.edges, uniform.double())
        return rows.clamp(max=len(self.plain) - 1)


def to_range(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in [-1, 1], channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def seeded(random: torch.Generator, seed: int, stream: int, step: int) -> torch.Generator:
    """The generator as it is at a step."""
    return random.manual_seed(int(philox(seed, stream, step).integers(2**62)))


@torch.no_grad()
def keep(ema: EMA) -> None:
    """Leave the averaged weights in the network."""
    for live, shadow in zip(ema.live, ema.shadow, strict=True):
        live.copy_(shadow)


# --- words ------------------------------------------------------------------------------------

WORDS_WINDOW = 24


def teach(
    recipe: Recipe, model: Taught, book: Book, tokenizer: CLIPTokenizer, machine: Machine,
    clock: Clock,
) -> None:  # fmt: skip
    """Go on with `training/text.py` on its book, all of the tower, for its share of the time."""
    read, _ = lessons(book.texts, tokenizer, book.words)
    kept = [row for row, one in enumerate(read) if len(one.ids) <= WORDS_WINDOW]
    device = machine.device
    whole = batch_of([read[row] for row in kept], WORDS_WINDOW)
    ids, last, ends, words = (
        part.to(device) for part in (whole.ids, whole.last, whole.ends, whole.words)
    )  # fmt: skip
    of_texts, of_words = book.of_texts[kept].to(device), book.of_words.to(device)
    edges = book.weights[kept].double().cumsum(0).to(device)
    rows = torch.zeros(recipe.text_batch, dtype=torch.int64, device=device)

    def loss() -> Tensor:
        batch = Batch(ids[rows], last[rows], ends[rows], words[rows])
        with machine.autocast():
            return teaching_loss(model, batch, of_texts[rows], of_words)["loss"]

    stepper = Stepper(machine, loss, machine.adamw([{"params": list(model.parameters())}]), [1.0])
    random = torch.Generator(device)
    begin, step = clock.gone, 0
    end = begin + recipe.text_takes * clock.seconds
    while (share := clock.share(begin, end)) < 1.0 or step < 8:
        seeded(random, recipe.seed, 32, step)
        uniform = torch.rand(len(rows), device=device, generator=random).double()
        rows.copy_(torch.searchsorted(edges, uniform * edges[-1]).clamp(max=len(edges) - 1))
        stepper.step(cosine(share, recipe.text_teaching_rate))
        step += 1
        machine.wait(step)
        if step == 5:
            clock.say(f"words: first steps done, loss {stepper.value.item():.4f}")
            stepper.record()
    clock.say(f"words: {step} steps of {len(rows)}, loss {stepper.value.item():.4f}")


@torch.no_grad()
def synonyms_right(
    model: Taught, things: Sequence[Thing], rows: Sequence[Mapping[str, object]],
    tokenizer: CLIPTokenizer, device: torch.device,
) -> float:  # fmt: skip
    """Share of the held-out synonyms that are nearest to a name of their own thing."""
    names = {thing.naming.name: str(row["name"]) for thing, row in zip(things, rows, strict=True)}
    vectors: list[Tensor] = []
    for texts in (list(names), list(SYNONYMS)):
        read, _ = lessons(texts, tokenizer, [])
        batch = batch_of(read, tokenizer.model_max_length)
        states = model(batch.ids.to(device))[torch.arange(len(read)), batch.last]
        vectors.append(F.normalize(model.of_text(states), dim=1))
    nearest = (vectors[1] @ vectors[0].T).argmax(1).tolist()
    said = list(names.values())
    asked = zip(nearest, SYNONYMS.values(), strict=True)
    return sum(said[at] in right.split("|") for at, right in asked) / len(SYNONYMS)


def taught_tower(
    recipe: Recipe, text: Path, tokenizer: CLIPTokenizer, things: Sequence[Thing],
    rows: Sequence[Mapping[str, object]], machine: Machine, clock: Clock,
) -> Taught:  # fmt: skip
    """The tower of `training/text.py`, taught on if its book is there."""
    tower = load_tower(text / "text_encoder")
    heads = load_file(text / "heads.safetensors")
    book = Book.load(text) if (text / "book.json").is_file() else None
    if book is not None:
        heads = {name: book.turn @ value for name, value in heads.items()}
    model = Taught(tower, len(heads["of_text"]))
    with torch.no_grad():
        model.of_text.weight.copy_(heads["of_text"])
        model.of_word.weight.copy_(heads["of_word"])
    model = model.to(machine.device).eval()
    before = synonyms_right(model, things, rows, tokenizer, machine.device)
    clock.say(f"nearest name of 100 synonyms: {before:.0%}", synonyms_in_tower_before=before)
    if book is not None and recipe.text_takes:
        teach(recipe, model, book, tokenizer, machine, clock)
        after = synonyms_right(model, things, rows, tokenizer, machine.device)
        clock.say(f"nearest name of 100 synonyms: {after:.0%}", synonyms_in_tower=after)
    for parameter in model.parameters():
        parameter.grad = None
    return model


# --- stage 1 ---------------------------------------------------------------------------------


def reconstruct(module: Any, distance: nn.Module, recipe: Recipe, real: Tensor, noise: Tensor,
                corner: Tensor) -> Tensor:  # fmt: skip
    """L1 + squared error + perceptual + KL, and L1 for latents made half as large.

    The perceptual term and the last are of a quarter of the batch each.

    The last follows EQ-VAE (Kouzelis et al. 2025): a reduced latent is to decode to the reduced
    picture, which makes the latent space smooth.

    Args:
        corner: int64 [2], where the perceptual term looks at a quarter of the picture.
    """
    fake, latents, kl = module(real, noise)
    fake = fake.float()
    gap = fake - real
    loss = gap.abs().mean() + recipe.squared * gap.square().mean() + recipe.kl * kl
    some = len(real) // 4
    half = recipe.size // 2
    rows = corner[0] + torch.arange(half, device=real.device)
    columns = corner[1] + torch.arange(half, device=real.device)
    parts = [p[-some:].index_select(2, rows).index_select(3, columns) for p in (fake, real)]
    loss = loss + recipe.perceptual * distance(*parts).mean()
    if recipe.equivariance:
        small = module.decode(F.avg_pool2d(latents[:some], 2)).float()
        loss = loss + recipe.equivariance * F.l1_loss(small, F.avg_pool2d(real[:some], 2))
    return loss


class Sampled(Autoencoding):
    """Autoencoding that also gives the drawn latents."""

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        """Pictures [B, 3, H, W] and noise [B, C, h, w] -> reconstructions, latents, KL."""
        vae: Any = self.vae  # its layers one by one: its own methods do not compile in one piece
        mean, logvar = vae.quant_conv(vae.encoder(pictures)).float().chunk(2, 1)
        logvar = logvar.clamp(-30.0, 20.0)
        latents = mean + torch.exp(0.5 * logvar) * noise
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return self.decode(latents), latents, kl

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pictures [B, 3, H, W]."""
        vae: Any = self.vae
        return vae.decoder(vae.post_quant_conv(latents))


def fresh_autoencoder(recipe: Recipe) -> KLAutoencoder:
    """An autoencoder with the first weights of diffusers' class."""
    torch.manual_seed(recipe.seed)
    theirs = build_vae("kl", recipe.vae_channels, 1, recipe.latent_channels, 8, recipe.size)
    vae = KLAutoencoder(theirs.config)  # pyright: ignore[reportArgumentType]
    vae.load_state_dict(theirs.state_dict())
    return vae


def train_autoencoder(
    recipe: Recipe, vae: KLAutoencoder, pictures: Pictures, machine: Machine, clock: Clock
) -> None:  # fmt: skip
    """Stage 1, until its share of the time is over; leaves the averaged weights in it."""
    vae.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    module = Sampled(vae)
    distance = random_features().to(machine.device)
    batch, device = recipe.vae_batch, machine.device
    latent = recipe.size // 2 ** (len(recipe.vae_channels) - 1)
    real = torch.zeros(batch, 3, recipe.size, recipe.size, device=device)
    real = real.contiguous(memory_format=torch.channels_last)
    noise = torch.zeros(batch, recipe.latent_channels, latent, latent, device=device)
    corner = torch.zeros(2, dtype=torch.int64, device=device)
    work = machine.compiled(lambda: reconstruct(module, distance, recipe, real, noise, corner))

    def loss() -> Tensor:
        with machine.autocast():
            return work()

    optimizer = machine.adamw([{"params": list(vae.parameters()), "weight_decay": 0.0}])
    stepper = Stepper(machine, loss, optimizer, [1.0])
    ema = EMA(vae, recipe.ema ** (2 * recipe.ema_every))
    random = torch.Generator(device)
    begin, end, step, taken = clock.gone, recipe.vae_ends * clock.seconds, 0, 0.0
    while (share := clock.share(begin, end)) < 1.0 or step < 12:
        if step % 20 == 0:
            pictures.fetch()
        seeded(random, recipe.seed, 30, step)
        fill_pictures(real, pictures, recipe, random)
        noise.normal_(generator=random)
        corner.random_(0, recipe.size // 2 + 1, generator=random)
        stepper.step(cosine(share, recipe.vae_rate))
        step += 1
        machine.wait(step)
        if step % recipe.ema_every == 0:
            ema.update()
        if step == 5:
            clock.say(f"stage 1: first steps done, loss {stepper.value.item():.4f}")
            stepper.record()
            taken = clock.gone
        if step % 500 == 0:
            pace = (step - 5) * batch / (clock.gone - taken)
            clock.say(f"stage 1: step {step}, loss {stepper.value.item():.4f}, {pace:.0f}/s, "
                      f"{len(pictures.order) * BLOCK} composed")  # fmt: skip
    pace = (step - 5) * batch / max(1e-6, clock.gone - taken)
    clock.say(f"stage 1: {step} steps of {batch}, {pace:.0f} pictures/s", vae_steps=step,
              vae_pictures_per_second=round(pace))  # fmt: skip
    keep(ema)


def fill_pictures(
    real: Tensor, pictures: Pictures, recipe: Recipe, random: torch.Generator
) -> None:  # fmt: skip
    """A batch of plain and composed pictures, about half of each, half of them mirrored."""
    batch = len(real)
    uniform = torch.rand(batch, device=real.device, generator=random)
    made = len(pictures.order) * BLOCK
    half = batch // 2 if made else batch
    real[:half] = to_range(pictures.plain[pictures.plain_rows(uniform[:half])])
    if made:
        rows = (uniform[half:] * made).long().clamp(max=made - 1)
        real[half:] = to_range(pictures.composed[rows])
    real[::2] = real[::2].flip(3)


@torch.no_grad()
def encode_all(vae: KLAutoencoder, pictures: Tensor, machine: Machine, batch: int = 2048) -> Tensor:
    """Means of latents, bfloat16 [N, C, h, w]."""
    found = []
    for part in pictures.split(batch):
        with machine.autocast():
            found.append(
                DiffusersAutoencoder(vae).moments(to_range(part)).chunk(2, 1)[0].bfloat16()
            )
    return torch.cat(found)


@torch.no_grad()
def standardise(vae: KLAutoencoder, plain: Tensor, weights: np.ndarray, machine: Machine) -> None:
    """Fold mean and deviation of the latents of the plain pictures into the autoencoder."""
    latents = encode_all(vae, plain, machine).double()
    share = torch.from_numpy(weights).to(latents.device)[:, None]
    mean = (latents.mean((2, 3)) * share).sum(0)
    square = ((latents - mean[:, None, None]).square().mean((2, 3)) * share).sum(0)
    standardise_latents(vae, mean.float(), square.sqrt().float())


# --- stage 2 ---------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Text tower and U-Net: noisy latents [B, C, h, w], times [B], tokens [B, L] -> v."""

    def __init__(self, unet: CrossAttentionUNet, tower: ClipTextEncoder) -> None:
        super().__init__()
        self.unet, self.tower = unet, tower

    def states(self, ids: Tensor) -> Tensor:
        """States for cross-attention [B, L, D]."""
        return self.tower(ids).last_hidden_state

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x, t, self.states(ids))


class Lessons:
    """Latents and captions of stage 2 on the device, and the batches made of them."""

    def __init__(
        self, pictures: Pictures, plain: Tensor, composed: Tensor, captions: Tensor, empty: Tensor
    ) -> None:
        self.pictures = pictures
        self.plain, self.composed = plain, composed
        self.captions, self.told, self.empty = captions, pictures.tokens(), empty

    def fill(self, latents: Tensor, ids: Tensor, recipe: Recipe, random: torch.Generator) -> None:
        """A batch: plain pictures with one of their captions, then composed ones; some untold."""
        batch = len(latents)
        made = len(self.composed)
        plain = round(recipe.plain * batch) if made else batch
        uniform = torch.rand(3, batch, device=latents.device, generator=random)
        rows = self.pictures.plain_rows(uniform[0, :plain])
        which = (uniform[1, :plain] * self.captions.shape[1]).long()
        latents[:plain] = self.plain[rows].float()
        ids[:plain] = self.captions[rows, which].long()
        if made:
            others = (uniform[0, plain:] * made).long().clamp(max=made - 1)
            latents[plain:] = self.composed[others].float()
            ids[plain:] = self.told[others].long()
        dropped = uniform[2] < recipe.caption_dropout
        ids[:] = torch.where(dropped[:, None], self.empty.long(), ids)


class Anchor:
    """Keeps what the tower means: texts and the tower's states of them before stage 2.

    Args:
        ids: tokens of texts, int64 [N, L].
        heads: matrices that meaning is read through.
    """

    def __init__(self, tower: ClipTextEncoder, ids: Tensor, heads: list[Tensor]) -> None:
        self.tower = tower
        self.ids = ids
        self.heads = heads
        with torch.no_grad():
            parts = [self.read(part) for part in ids.split(1024)]
        self.wanted = torch.cat(parts).bfloat16()

    def read(self, ids: Tensor) -> Tensor:
        """Unit vectors of every state, one beside the other: [B, L, 2 x d]."""
        states = self.tower(ids).last_hidden_state
        return torch.cat([F.normalize(F.linear(states, head), dim=-1) for head in self.heads], -1)

    def loss(self, rows: Tensor) -> Tensor:
        """One minus the mean cosine with what it was."""
        now = self.read(self.ids[rows])
        return 1.0 - (now.float() * self.wanted[rows].float()).sum(-1).mean() / len(self.heads)


def train_denoiser(
    recipe: Recipe, model: Denoiser, lessons: Lessons, anchor: Anchor, process: DiscreteVP,
    machine: Machine, clock: Clock, save: Callable[[], None],
) -> None:  # fmt: skip
    """Stage 2, until its share of the time is over; leaves the averaged weights in the model."""
    batch, device = recipe.batch, machine.device
    latents = torch.zeros(batch, *lessons.plain.shape[1:], device=device)
    noise = torch.zeros_like(latents)
    ids = torch.zeros(batch, lessons.empty.shape[-1], dtype=torch.int64, device=device)
    times = torch.zeros(batch, dtype=torch.int64, device=device)
    places = torch.arange(batch, device=device)  # one time in each of `batch` equal parts
    rows = torch.zeros(max(1, batch // 4), dtype=torch.int64, device=device)
    whole = torch.arange(process.num_train_timesteps, dtype=torch.float64, device=device)
    alphas, sigmas = (part.float() for part in process.alpha_sigma(whole))

    def error() -> Tensor:
        alpha, sigma = (part[times].view(-1, 1, 1, 1) for part in (alphas, sigmas))
        x = alpha * latents + sigma * noise
        target = alpha * noise - sigma * latents  # v, Salimans & Ho 2022
        v = model(x, times, ids).float()
        # Not by min-SNR: much noise, where what is drawn is decided, would weigh next to nothing.
        return F.mse_loss(v, target) + recipe.anchor * anchor.loss(rows)

    work = machine.compiled(error)

    def loss() -> Tensor:
        with machine.autocast():
            return work()

    unet, tower = list(model.unet.parameters()), list(_trained(model.tower))
    optimizer = machine.adamw([{"params": unet}, {"params": tower, "weight_decay": 0.0}])
    stepper = Stepper(machine, loss, optimizer, [1.0, recipe.text_rate])
    ema = EMA(model, recipe.ema**recipe.ema_every)
    random = torch.Generator(device)
    begin, end = clock.gone, recipe.diffusion_ends * clock.seconds
    step, taken, saved = 0, 0.0, clock.gone
    while (share := clock.share(begin, end)) < 1.0 or step < 12:
        seeded(random, recipe.seed, 31, step)
        lessons.fill(latents, ids, recipe, random)
        noise.normal_(generator=random)
        spread = (torch.rand(batch, device=device, generator=random) + places) / batch
        times.copy_((spread * len(alphas)).long().clamp(max=len(alphas) - 1))
        rows.random_(0, len(anchor.ids), generator=random)
        stepper.step(cosine(share, recipe.rate))
        step += 1
        machine.wait(step)
        if step % recipe.ema_every == 0:
            ema.update()
        if step == 5:
            clock.say(f"stage 2: first steps done, loss {stepper.value.item():.4f}")
            stepper.record()
            taken = clock.gone
        if step % 500 == 0:
            pace = (step - 5) * batch / (clock.gone - taken)
            clock.say(f"stage 2: step {step}, loss {stepper.value.item():.4f}, {pace:.0f}/s")
        if clock.gone - saved > 60:
            with ema.applied():
                save()
            saved = clock.gone
    pace = (step - 5) * batch / max(1e-6, clock.gone - taken)
    clock.say(f"stage 2: {step} steps of {batch}, {pace:.0f} pictures/s", steps=step,
              samples_per_second=round(pace))  # fmt: skip
    keep(ema)


def _trained(module: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters() if p.requires_grad)


def freeze_below(tower: ClipTextEncoder, trained: int) -> None:
    """Let only the upper layers and the last norm of a tower be trained."""
    tower.requires_grad_(False)
    text: Any = getattr(tower, "text_model", tower)
    for layer in list(text.encoder.layers)[-trained:] if trained else []:
        layer.requires_grad_(True)
    if trained:
        text.final_layer_norm.requires_grad_(True)


# --- where it begins ---------------------------------------------------------------------------


class Begun:
    """What the run goes on from: a taught tower alone, or all of a model.

    Attributes:
        tokenizer, autoencoder, unet: as they are at the start.
    """

    def __init__(self, recipe: Recipe, text: Path | None, start: Path | None) -> None:
        self.text = text
        self.autoencoder: Any
        self.unet: Any
        self.model = None if start is None else Bundle.load(start, dtype="float32", device="cpu")
        folder = text if start is None else start
        assert folder is not None
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder / "tokenizer"))
        if self.model is None:
            width = json.loads((folder / "text_encoder" / "config.json").read_text("utf-8"))
            self.autoencoder = fresh_autoencoder(recipe)
            self.unet = fresh_unet(recipe, width["hidden_size"])
        else:
            self.autoencoder, self.unet = self.model.autoencoder.module, self.model.network.module
        self.autoencoder.requires_grad_(True)
        self.unet.requires_grad_(True)

    def tower(
        self, recipe: Recipe, things: Sequence[Thing], rows: Sequence[Mapping[str, object]],
        machine: Machine, clock: Clock,
    ) -> tuple[ClipTextEncoder, list[Tensor]]:  # fmt: skip
        """The text tower, and matrices through which its meaning is read: all of it of a model."""
        if self.model is not None:
            tower: Any = self.model.conditioner.modules["text_encoder"].to(machine.device).eval()
            return tower, [torch.eye(tower.config.hidden_size, device=machine.device)]
        assert self.text is not None
        taught = taught_tower(recipe, self.text, self.tokenizer, things, rows, machine, clock)
        return taught.tower, [taught.of_text.weight.detach(), taught.of_word.weight.detach()]


# --- all of it --------------------------------------------------------------------------------


def encoder(tokenizer: CLIPTokenizer) -> Callable[[list[str]], np.ndarray]:
    """Captions -> tokens padded to the window, int16 [N, L]."""

    def encode(captions: list[str]) -> np.ndarray:
        found = tokenizer(
            captions, truncation=True, padding="max_length", max_length=tokenizer.model_max_length
        )
        return np.array(found["input_ids"], np.int16)

    return encode


def shards(values: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """Tensors in order, in parts of at most so many bytes as float16."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in values.items():
        if size + 2 * value.numel() > most:
            parts.append({})
            size = 0
        parts[-1][name] = value
        size += 2 * value.numel()
    return parts


def half(module: nn.Module) -> dict[str, Tensor]:
    """Weights in float16 on the CPU."""
    return {name: value.detach().half().cpu() for name, value in module.state_dict().items()}


def main(
    data: Annotated[Path, typer.Option(help="Picture folder with metadata.jsonl.")],
    text: Annotated[Path | None, typer.Option(help="What training/text.py left.")] = None,
    start: Annotated[
        Path | None, typer.Option(help="A model of this recipe to go on from.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where weights and numbers go.")] = Path(
        "runs/emoji128"
    ),
    model: Annotated[Path, typer.Option(help="The model's folder.")] = Path("runs/emoji128/model"),
    wordnet: Annotated[Path | None, typer.Option(help="Folder of data.noun.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for all of it.")] = 540.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small networks, few pictures.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile the networks (GPU).")] = True,
    graphs: Annotated[bool, typer.Option(help="Record steps as CUDA graphs (GPU).")] = True,
    settings: Annotated[str, typer.Option(help="Changes of the recipe, as JSON.")] = "{}",
) -> None:
    """Train a 128-pixel emoji model; training/measure/evaluate_following.py measures it."""
    if (text is None) == (start is None):
        raise typer.BadParameter("give --text, what training/text.py left, or --start, a model.")
    clock = Clock(seconds)
    base = TINY if tiny else Recipe()
    recipe = Recipe(**(asdict(base) | json.loads(settings)))
    make_folder(out)
    begun = Begun(recipe, text, start)
    train(recipe, data, begun, out, model, wordnet, clock, tiny, compile, graphs)


def train(
    recipe: Recipe, data: Path, begun: "Begun", out: Path, folder: Path, wordnet: Path | None,
    clock: Clock, tiny: bool, compiled: bool, graphs: bool,
) -> None:  # fmt: skip
    """Read, compose meanwhile, stage 1, latents, stage 2."""
    words = None if wordnet is None else WordNet(wordnet)
    every = read_rows(data, None)
    if tiny and len(every) > 1000:  # every style of some emoji
        every = [row for row in every if zlib.crc32(str(row["base"]).encode()) % 30 == 0]
    things, pictures, alphas = read_all(data, every, words, recipe.size, max(1, recipe.workers))
    clock.say(f"{len(every)} pictures read")
    kept = [i for i, row in enumerate(every) if row["split"] == "train"]
    rows = [every[i] for i in kept]
    own = [_moved(things[i], at) for at, i in enumerate(kept)]
    tokenizer = begun.tokenizer
    encode = encoder(tokenizer)
    plain = pictures[kept]
    composer = Composer(rows, own, plain, alphas[kept], recipe.seed)
    pool = Pool(composer, encode, recipe.composed, tokenizer.model_max_length, recipe.workers)
    clock.say(f"{recipe.workers} processes compose pictures of {len(rows)}")

    cuda = torch.cuda.is_available()  # not before the processes are there: they are forks
    machine = Machine(torch.device("cuda" if cuda else "cpu"), compiled and cuda, graphs and cuda)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    tower, heads = begun.tower(recipe, own, rows, machine, clock)
    weights = uneven(own)
    stock = Pictures(plain, pool, weights, machine)
    vae = begun.autoencoder
    train_autoencoder(recipe, vae, stock, machine, clock)
    standardise(vae, stock.plain, weights, machine)
    save_tensors(half(vae), out / "vae.safetensors", {}, replace=True)
    pool.stop()
    stock.fetch(pool.blocks)
    made = len(stock.order) * BLOCK
    clock.say(f"{made} composed pictures; memory {machine.memory()}", composed=made)
    lesson = lessons_of(recipe, vae, stock, made, rows, own, encode, machine, clock)
    vae.eval()
    unseen = [i for i, row in enumerate(every) if row["split"] in HELD_OUT and not row["skin_tone"]]
    decibels = measure_autoencoder(vae, pictures[unseen], machine) if unseen else 0.0
    clock.say(f"autoencoder: {decibels:.2f} dB of {len(unseen)} held-out pictures",
              vae_psnr_db=round(decibels, 2), vae_pictures=len(unseen))  # fmt: skip
    unet = begun.unet
    model, process = finish(
        recipe, lesson, own, unet, tower, heads, tokenizer, out, machine, clock
    )  # fmt: skip
    bundle = Bundle(
        DiffusersAutoencoder(vae),
        TextConditioner(ClipTower(model.tower.eval(), tokenizer)),
        DiffusersUNet(model.unet.eval(), recipe.latent_channels),
        process,
        "v",
        captions=known_captions(rows, recipe.seed),
    )
    bundle.save(folder, dtype=torch.float16)
    write_json(out / "report.json", clock.notes, replace=True)
    clock.say("done")


def fresh_unet(recipe: Recipe, width: int) -> CrossAttentionUNet:
    """A U-Net with the first weights of diffusers' class, for text states of this width."""
    torch.manual_seed(recipe.seed + 1)
    latent = recipe.size // 2 ** (len(recipe.vae_channels) - 1)
    return build_unet(
        recipe.latent_channels, latent, recipe.unet_channels, 1, (True, True), recipe.head_dim,
        width,
    )  # fmt: skip


def lessons_of(
    recipe: Recipe, vae: KLAutoencoder, stock: Pictures, made: int,
    rows: Sequence[Mapping[str, object]], things: Sequence[Thing],
    encode: Callable[[list[str]], np.ndarray], machine: Machine,
    clock: Clock,
) -> Lessons:  # fmt: skip
    """Encode all pictures and caption the plain ones; the composed pictures are let go."""
    latents = encode_all(vae, stock.plain, machine), encode_all(vae, stock.composed[:made], machine)
    clock.say(f"latents encoded, deviation {latents[1].float().std():.3f}")
    stock.composed = stock.composed[:0]
    captions = [
        plain_captions(row, thing, philox(recipe.seed, 23, thing.row), CAPTIONS)
        for row, thing in zip(rows, things, strict=True)
    ]
    told = encode([caption for one in captions for caption in one]).reshape(len(rows), CAPTIONS, -1)
    clock.say("captions made")
    ids = torch.from_numpy(told).to(machine.device)
    empty = torch.from_numpy(encode([""])).to(machine.device)
    return Lessons(stock, *latents, ids, empty)


def known_captions(rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[str, ...]:
    """The name of every emoji without a skin tone, as a caption says it; in random order."""
    names = sorted({with_article(row["name"]) for row in rows if not row["skin_tone"]})
    return tuple(philox(seed, 24).permutation(names).tolist())


def _moved(thing: Thing, row: int) -> Thing:
    return replace(thing, row=row)


def load_tower(folder: Path) -> ClipTextEncoder:
    """The taught tower, whichever way its version of transformers spells the names."""
    told = json.loads((folder / "config.json").read_text("utf-8"))
    known = {each.name for each in fields(ClipTextConfig)}
    tower = ClipTextEncoder(ClipTextConfig(**{k: v for k, v in told.items() if k in known}))
    stored = load_file(folder / "model.safetensors")
    stored = {name.removeprefix("text_model."): value for name, value in stored.items()}
    tower.load_state_dict({name: stored[name].float() for name in tower.state_dict()})
    return tower


def finish(
    recipe: Recipe, lessons: Lessons, things: Sequence[Thing], unet: CrossAttentionUNet,
    tower: ClipTextEncoder, heads: list[Tensor], tokenizer: CLIPTokenizer, out: Path,
    machine: Machine, clock: Clock,
) -> tuple[Denoiser, DiscreteVP]:  # fmt: skip
    """Train the U-Net and the tower's upper layers; writes both now and then."""
    freeze_below(tower, recipe.trained_layers)
    unet.to(machine.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model = Denoiser(unet, tower)
    phrases = {name for one in things for name in (one.naming.name, *one.naming.also)}
    phrases |= set(SYNONYMS) | {with_article(phrase) for phrase in phrases}
    ids = torch.from_numpy(encoder(tokenizer)(sorted(phrases))).long().to(machine.device)
    anchor = Anchor(tower, ids, heads)
    process = processes.create(recipe.process)
    assert isinstance(process, DiscreteVP)

    def save() -> None:
        for number, part in enumerate(shards(half(unet), 14_000_000)):
            save_tensors(part, out / f"unet-{number}.safetensors", {}, replace=True)
        save_tensors(half(tower), out / "text.safetensors", {}, replace=True)
        clock.say("weights saved")

    train_denoiser(recipe, model, lessons, anchor, process, machine, clock, save)
    save()
    return model, process


def measure_autoencoder(vae: KLAutoencoder, pictures: np.ndarray, machine: Machine) -> float:
    """Mean PSNR in dB of reconstructions of uint8 pictures [N, H, W, 3]."""
    scores: list[Tensor] = []
    for part in torch.from_numpy(pictures).split(64):
        real = to_range(part.to(machine.device))
        mean = DiffusersAutoencoder(vae).moments(real).chunk(2, 1)[0]
        with torch.no_grad():
            fake = vae.decode(mean).float().clamp(-1, 1)
        scores.append(psnr(real, fake).cpu())
    return float(torch.cat(scores).mean())


HELD_OUT = ("test_style", "test_novel", "test_colour", "test_struct")

if __name__ == "__main__":
    typer.run(main)
