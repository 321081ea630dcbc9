"""Pictures a second of a fine-tune, here and by diffusers' recipe, on the same model and pictures.

    python training/time_finetune.py --data DIR

Ours is training/finetune.py as it is: the same command with few and with many steps, and the
difference. Theirs is the loop of diffusers' examples/text_to_image/train_text_to_image.py and
train_text_to_image_lora.py without their options, written out in one function: each step opens its
pictures, crops and flips, tokenizes, encodes pictures and captions, draws noise, and takes a step
of AdamW; the full fine-tune with their EMA. torchvision's transforms are done by Pillow. Both
sides: float32, batches of one size in one piece, LoRA of one rank in the attention, in turn.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finetune  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.bundle.find import find
from latentdiff.data.folder import Example, list_folder
from latentdiff.learning.finetuning import resolve

RANK, PICTURES, FEW = 4, 64, 4
ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]

Clock = tuple[float, float]
"""Seconds of the processor in this process, and of the wall."""


def now() -> Clock:
    return time.process_time(), time.perf_counter()


def since(start: Clock) -> Clock:
    cpu, wall = now()
    return cpu - start[0], wall - start[1]


def ours(method: str, data: Path, model: Path, batch: int, steps: int) -> Clock:
    """A whole run of training/finetune.py."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stderr(io.StringIO()):
        values: dict[str, object] = {
            "method": method,
            "model": str(model),
            "out": out,
            "data": {"root": str(data), "flip": True},
            "optim": {"steps": steps, "batch_size": batch, "warmup": 0, "schedule": "constant"},
            "lora": {"rank": RANK, "targets": ATTENTION},
            "objective": {"caption_dropout": 0.0, "min_snr_gamma": None},
            "sample_prompts": ["a cat"],
        }
        start = now()
        with contextlib.redirect_stdout(io.StringIO()):
            finetune.train(resolve(values, "time_finetune"), False)
        return since(start)


class Pictures(Dataset[dict[str, Tensor]]):
    """Their preprocessing of a picture and its caption, at each access."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any, size: int) -> None:
        self.examples, self.tokenizer, self.size = examples, tokenizer, size
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self.examples[index]
        image = Image.open(example.path).convert("RGB")
        scale = self.size / min(image.size)
        sides = round(image.width * scale), round(image.height * scale)
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        if self.random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        words = self.tokenizer(
            example.captions[0],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        return {"pixel_values": (pixels - 0.5) / 0.5, "input_ids": words.input_ids[0]}


def theirs(method: str, examples: Sequence[Example], model: Path, batch: int, steps: int) -> Clock:
    """The time of `steps` steps of the recipe, after FEW that are not counted."""
    accelerator = Accelerator()
    pipe: Any = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    scheduler: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    vae, text_encoder, unet = pipe.vae, pipe.text_encoder, pipe.unet
    for network in (vae, text_encoder, unet):
        network.requires_grad_(False).to(accelerator.device)
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
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2, eps=1e-8)
    size = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = Pictures(examples, pipe.tokenizer, size)
    loader = DataLoader(pictures, batch, shuffle=True, drop_last=True)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    done, start = 0, now()
    while True:
        for part in loader:
            if done == FEW:
                start = now()
            if done == FEW + steps:
                return since(start)
            with accelerator.accumulate(unet):
                latents = vae.encode(part["pixel_values"]).latent_dist.sample()
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
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            if ema is not None:
                ema.step(unet.parameters())
            done += 1


def some_pictures(data: Path, to: Path) -> list[Example]:
    """A folder of the first pictures of another."""
    examples = list_folder(data)[:PICTURES]
    lines: list[str] = []
    for number, example in enumerate(examples):
        name = f"{number:04d}{example.path.suffix}"
        (to / name).write_bytes(example.path.read_bytes())
        lines.append(json.dumps({"file_name": name, "text": example.captions[0]}))
    (to / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a folder of captioned pictures", required=True)
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="that are timed, each time")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model = find(given.model)
    with tempfile.TemporaryDirectory() as folder:
        examples = some_pictures(given.data, Path(folder))
        for method in ("lora", "full"):
            times: dict[str, list[Clock]] = {"latentdiff": [], "diffusers' recipe": []}
            for _ in range(given.rounds):
                many, few = (
                    ours(method, Path(folder), model, given.batch, steps)
                    for steps in (FEW + given.steps, FEW)
                )
                times["latentdiff"].append((many[0] - few[0], many[1] - few[1]))
                spent = theirs(method, examples, model, given.batch, given.steps)
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
        print(f"{method}: {side}: {cpu:.1f} pictures a CPU second, {wall:.1f} a second")
    one, other = rates.values()
    print(f"{method}: latentdiff / diffusers: {one[0] / other[0]:.2f}, {one[1] / other[1]:.2f}")


if __name__ == "__main__":
    main()
