"""Pictures a second of a fine-tune, here and by diffusers' recipe, on the same model and pictures.

    OMP_NUM_THREADS=1 python training/measure/time_finetune.py --data DIR [--side 1024]
    OMP_NUM_THREADS=1 python training/measure/time_finetune.py --data DIR --sd1 256 \\
        --batch 4 --pictures 8 --steps 3 --methods lora

Ours is training/finetune.py as it is. Theirs is the loop of diffusers'
examples/text_to_image/train_text_to_image.py and train_text_to_image_lora.py without their options,
written out in one function: each step opens its pictures, resizes, crops and flips, tokenizes,
encodes pictures and captions, draws noise, and takes a step of AdamW; the full fine-tune with their
EMA. torchvision's transforms are done by Pillow, which torchvision itself calls on such pictures.
Both sides: float32, batches of one size in one piece, LoRA of one rank in the attention, in turn,
each time in a process of its own (ours sets how its process keeps memory, which theirs must not
gain from), timed from the end of one step of the optimizer to the end of another. What ours does
once before its first step (checking and encoding the pictures) is timed by itself. --side N has
both sides read the same pictures enlarged to NxN, as JPEG: of the size that a camera's are, but
smoother. --sd1 N takes a model of the size and shape of Stable Diffusion 1.x, trained at NxN, with
random weights, which take the same time as trained ones; the full fine-tune needs 24 GB at N = 256.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff.bundle import Bundle
from latentdiff.data.check import check_pictures
from latentdiff.data.examples import Example
from latentdiff.data.folder import list_folder
from latentdiff.data.variants import variants
from latentdiff.diffusion import process
from latentdiff.files import writing_folder
from latentdiff.formats.location import find
from latentdiff.learning.captions import Captions, CaptionStates
from latentdiff.learning.finetune_config import resolve
from latentdiff.learning.samples import encode_samples
from latentdiff.models.autoencoder import DiffusersAutoencoder
from latentdiff.models.conditioner import TextConditioner
from latentdiff.models.fresh_text import build_text_encoder
from latentdiff.models.network import DiffusersUNet
from latentdiff.models.text_encoders import ClipTower
from latentdiff.models.vae import build_vae
from latentdiff.pictures import open_picture

RANK, FEW = 4, 2
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]

Given = ParamSpec("Given")
Clock = tuple[float, float]
"""Seconds of the processor in this process, and of the wall."""

sys.path.insert(0, str(Path(__file__).parents[1]))
finetune = import_module("finetune")  # the script beside this folder


def now() -> Clock:
    return time.process_time(), time.perf_counter()


def since(start: Clock) -> Clock:
    cpu, wall = now()
    return cpu - start[0], wall - start[1]


@contextlib.contextmanager
def steps_timed(most: int) -> Iterator[list[Clock]]:
    """The time at the end of each step that an optimizer takes inside the context.

    Raises:
        Enough: `most` were taken.
    """
    ends: list[Clock] = []

    def note(*_: object) -> None:
        ends.append(now())
        if len(ends) == most:
            raise Enough

    hook = register_optimizer_step_post_hook(note)
    try:
        yield ends
    finally:
        hook.remove()


def alone(task: Callable[Given, Clock], *args: Given.args, **kwargs: Given.kwargs) -> Clock:
    """Run a task in a process of its own and return its result."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *args, **kwargs).result()


def between(ends: list[Clock]) -> Clock:
    """From the end of step FEW to that of the last."""
    first, last = ends[FEW - 1], ends[-1]
    return last[0] - first[0], last[1] - first[1]


def sd1(size: int, tokenizer: Path) -> Bundle:
    """The shape of Stable Diffusion 1.x (Rombach et al. 2022, table 15), weights at random."""
    words = CLIPTokenizer.from_pretrained(tokenizer, model_max_length=77)
    unet = UNet2DConditionModel(sample_size=size // 8, cross_attention_dim=768)  # else its shape
    vae = build_vae("kl", (128, 256, 512, 512), 2, 4, 32, size)
    encoder = build_text_encoder(words, 768, 12, 12)
    autoencoder = DiffusersAutoencoder(vae)
    return Bundle(
        autoencoder,
        TextConditioner(ClipTower(encoder, words)),
        DiffusersUNet(unet, autoencoder.channels),
        process.create("vp-scaled-linear"),
        "eps",
    )


class Enough(Exception):
    """The steps that were wanted are done."""


def ours(method: str, data: Path, model: Path, batch: int, steps: int) -> Clock:
    """The time of `steps` steps of training/finetune.py, after FEW that are not counted."""
    with tempfile.TemporaryDirectory() as out:
        values: dict[str, object] = {
            "method": method,
            "model": str(model),
            "out": out,
            "precision": "no",  # not the default, which is bf16 where the processor has it
            "data": {"root": str(data), "flip": True},
            "optim": {
                "steps": FEW + steps + 1,  # the last is not begun
                "batch_size": batch,
                "warmup": 0,
                "schedule": "constant",
            },
            "lora": {"rank": RANK, "targets": ATTENTION},
            "objective": {"caption_dropout": 0.0, "min_snr_gamma": None},
            "sample_prompts": ["a cat"],
        }
        quiet = io.StringIO()
        with (
            contextlib.redirect_stderr(quiet),
            contextlib.redirect_stdout(quiet),
            steps_timed(FEW + steps) as ends,
            mock.patch.object(finetune.Finetuning, "evaluate", return_value=None),
            contextlib.suppress(Enough),
        ):
            finetune.train(resolve(values, "time_finetune"), False)
        return between(ends)


def prepare(examples: Sequence[Example], model: Path) -> Clock:
    """Time our work before the first step: checks, and encoding of new pictures and captions."""
    bundle = Bundle.load(model, dtype="float32")
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stderr(io.StringIO()):
        start = now()
        checked = check_pictures(examples, min(bundle.size) // 2)
        buckets = [bundle.size] * len(checked.examples)
        encode_samples(bundle.autoencoder, checked, buckets, variants(1, True), Path(cache))
        texts = [example.captions for example in checked.examples]
        captions = Captions(bundle.conditioner, texts, 0.0, 0)
        CaptionStates(captions, bundle.conditioner, Path(cache))
        return since(start)


class Pictures(Dataset[dict[str, Tensor]]):
    """Their preprocessing of a picture and its caption, at each access."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any, size: int) -> None:
        self.examples, self.tokenizer, self.size = examples, tokenizer, size
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """A whole batch, whose captions are tokenized in one go, as `datasets` has it."""
        words = self.tokenizer(
            [self.examples[index].captions[0] for index in indices],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return [
            {"pixel_values": self.pixels(self.examples[index]), "input_ids": ids}
            for index, ids in zip(indices, words.input_ids, strict=True)
        ]

    def pixels(self, example: Example) -> Tensor:
        image = Image.open(example.path).convert("RGB")
        scale = self.size / min(image.size)
        sides = round(image.width * scale), round(image.height * scale)
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        if self.random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        return (pixels - 0.5) / 0.5


def theirs(
    method: str,
    examples: Sequence[Example],
    model: Path,
    batch: int,
    steps: int,
    precision: str = "no",
) -> Clock:
    """The time of `steps` steps of the recipe, after FEW that are not counted."""
    accelerator = Accelerator(mixed_precision=precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    pipe: Any = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    scheduler: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    vae, text_encoder, unet = pipe.vae, pipe.text_encoder, pipe.unet
    for network in (vae, text_encoder, unet):
        network.requires_grad_(False).to(accelerator.device)
    for network in (vae, text_encoder):
        network.to(dtype)
    ema = None
    if method == "lora":
        unet.add_adapter(
            LoraConfig(
                r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=ATTENTION
            )
        )
    else:
        unet.requires_grad_(True)
        ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config)
        ema.to(accelerator.device)
    unet.train()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    # Their LoRA script clips what is left of an iterator that the optimizer used up: nothing.
    clipped = [] if method == "lora" else parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, eps=1e-8)
    size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = Pictures(examples, pipe.tokenizer, size)
    loader = DataLoader(pictures, batch, shuffle=True, drop_last=True)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    with contextlib.suppress(Enough), steps_timed(FEW + steps) as ends:
        while True:
            for part in loader:
                with accelerator.accumulate(unet):
                    latents = vae.encode(part["pixel_values"].to(dtype)).latent_dist.sample()
                    latents = latents * vae.config.scaling_factor
                    noise = torch.randn_like(latents)
                    total = scheduler.config.num_train_timesteps
                    times = torch.randint(0, total, (len(latents),), device=latents.device)
                    noisy = scheduler.add_noise(latents, noise, times)
                    states = text_encoder(part["input_ids"], return_dict=False)[0]
                    target = noise
                    if scheduler.config.prediction_type == "v_prediction":
                        target = scheduler.get_velocity(latents, noise, times)
                    answer = unet(noisy, times, states, return_dict=False)[0]
                    loss = F.mse_loss(answer.float(), target.float(), reduction="mean")
                    gathered: Any = accelerator.gather(loss.repeat(batch))  # for their log
                    gathered.mean().item()
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(clipped, 1.0)
                    optimizer.step()
                    rate.step()
                    optimizer.zero_grad()
                if ema is not None:
                    ema.step(unet.parameters())
    return between(ends)


def some_pictures(data: Path, to: Path, count: int, side: int | None) -> list[Example]:
    """A folder of the first pictures of another, as they are or as JPEG of side x side."""
    lines: list[str] = []
    with writing_folder(to, replace=False) as stage:
        for number, example in enumerate(list_folder(data)[:count]):
            name = f"{number:04d}{example.path.suffix if side is None else '.jpg'}"
            if side is None:
                (stage / name).write_bytes(example.path.read_bytes())
            else:
                large = open_picture(example.path).resize((side, side), Image.Resampling.BICUBIC)
                large.save(stage / name, quality=95)
            lines.append(json.dumps({"file_name": name, "text": example.captions[0]}))
        (stage / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return list_folder(to)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a folder of captioned pictures", required=True)
    parser.add_argument("--pictures", type=int, default=32, help="how many of them")
    parser.add_argument("--side", type=int, help="enlarge them; default: as they are")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--sd1", type=int, metavar="N", help="or Stable Diffusion 1's shape at NxN")
    parser.add_argument("--methods", nargs="+", default=["lora", "full"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="that are timed, each time")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        model = find(given.model)
        if given.sd1 is not None:
            torch.manual_seed(0)
            model = sd1(given.sd1, model / "tokenizer").save(Path(name) / "sd1")
        examples = some_pictures(given.data, folder, given.pictures, given.side)
        once = [alone(prepare, examples, model)[0] for _ in range(given.rounds)]
        once = statistics.median(once) / len(examples)
        print(f"latentdiff, before the first step: {once:.4f} CPU seconds a picture")
        for method in given.methods:
            times: dict[str, list[Clock]] = {"latentdiff": [], "diffusers' recipe": []}
            for _ in range(given.rounds):
                spent = alone(ours, method, folder, model, given.batch, given.steps)
                times["latentdiff"].append(spent)
                spent = alone(theirs, method, examples, model, given.batch, given.steps)
                times["diffusers' recipe"].append(spent)
                print(method, times, file=sys.stderr, flush=True)
            report(method, times, given.batch * given.steps)


def report(method: str, times: dict[str, list[Clock]], pictures: int) -> None:
    """Medians of the rounds, and how much faster ours is."""
    rates = {
        side: [pictures / statistics.median(taken) for taken in zip(*rounds, strict=True)]
        for side, rounds in times.items()
    }
    for side, (cpu, wall) in rates.items():
        print(f"{method}: {side}: {cpu:.3g} pictures a CPU second, {wall:.3g} a second")
    one, other = rates.values()
    print(f"{method}: latentdiff / diffusers: {one[0] / other[0]:.2f}, {one[1] / other[1]:.2f}")


if __name__ == "__main__":
    main()
