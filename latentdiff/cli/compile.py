"""`latentdiff compile`: native code of a model's U-Net, for the engine `compiled`."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.cli import options
from latentdiff.cli.models import ModelOptions
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle
    from latentdiff.models.network import Network
    from latentdiff.pipeline import LatentDiffusionPipeline


def compile_model(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a file or a Hugging Face name. Default: the bundled emoji model.",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width in pixels. Default: the model's own."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=64, help="Pictures drawn at once.")] = 1,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Of the runs to be; 1, which is off, is another shape of calls. Default: the "
            "model's own."
        ),
    ] = None,
    fast: options.Fast = False,
    lora: options.Loras = None,
    dtype: options.Dtype = "auto",
    vae: options.Vae = None,
    prediction: options.PredictionName = None,
    variant: options.Variant = None,
) -> None:
    """Compile MODEL for pictures of one size, which are then drawn faster; takes minutes.

    It needs a C++ compiler. The code is for this processor, this torch, this number of threads
    and these weights, with the LoRAs that are named, and lies in ~/.cache/latentdiff/compiled (or
    below XDG_CACHE_HOME), where the engine `auto` finds it. Other sizes, batches and LoRAs are
    drawn as ever; run it again for each. What it takes, and what the packed engine does, is told.
    """
    chosen = ModelOptions(model, vae, prediction, variant, lora, fast=fast)
    chosen.check()
    pipe = chosen.load("cpu", dtype, "eager")
    from latentdiff.models.engines.compiling import compiling

    bundle = pipe.bundle
    height, width = (size, size) if size else bundle.size
    sizes = {"height": height, "width": width, "guidance_scale": guidance_scale}
    draw = partial(pipe, ["a picture"] * batch, seed=0, progress=False, **sizes)
    with compiling(bundle.network, _say) as network:
        _say("this takes a minute or more, much more for a large network")
        pipe.bundle = replace(bundle, network=network)
        draw(num_inference_steps=1)
        _compare(pipe, bundle, network, draw)
    _say("done: latentdiff generate draws with it by itself")


def _compare(
    pipe: "LatentDiffusionPipeline",
    bundle: "Bundle",
    network: "Network",
    draw: Callable[..., object],
) -> None:
    """Tell what four steps take with compiled code and packed, the least of four times each.

    Args:
        pipe: what `draw` draws with.
        bundle: the model, in no engine.
        network: with the code.
    """
    try:
        packed = bundle.inside("packed")
    except UserError:  # there is nothing to compare with
        return
    from latentdiff.models.engines.packages import cache_folder

    _say("timing four steps with the code and packed")
    sides = {"packed": packed, "compiled": replace(packed, network=network)}
    least = dict.fromkeys(sides, math.inf)
    for _ in range(4):
        for engine, side in sides.items():
            pipe.bundle = side
            start = time.perf_counter()
            draw(num_inference_steps=4)
            least[engine] = min(least[engine], time.perf_counter() - start)
    slower = least["packed"] < least["compiled"]
    advice = f": draw with --engine packed, or remove it from {cache_folder()}" if slower else ""
    told = f"4 steps take {least['compiled']:.3f} seconds with it"
    _say(f"{told}, and {least['packed']:.3f} packed{advice}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
