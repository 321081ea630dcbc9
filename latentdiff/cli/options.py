"""Options that several commands share, with their help."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.")]
Number = Annotated[int, typer.Option("-n", "--number", min=1, max=64, help="How many to draw.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Of the noise. Default: random, and printed.")
]
Out = Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Where the pictures go.")]
Grid = Annotated[
    bool, typer.Option("--grid", help="Also what was given and what came out, side by side.")
]
Fit = Annotated[
    bool, typer.Option("--fit", help="Make a larger picture as small as the model's own.")
]
StepCount = Annotated[int, typer.Option(min=1, max=1000, help="Of the solver.")]
GuidanceScale = Annotated[float, typer.Option(help="1 is off.")]
Negative = Annotated[str | None, typer.Option(metavar="TEXT", help="What to steer away from.")]
AlsoPrompts = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="TEXT:WEIGHT",
        help="A further prompt and its weight beside PROMPT's 1, as 'a hat:0.7'; below 0 steers "
        "away. May be given again.",
    ),
]
Weights = Annotated[
    bool,
    typer.Option(
        "--weights",
        help="Read weights of words in prompts: (x) is 1.1, (x:1.3) 1.3, [x] 1/1.1, \\( a bracket.",
    ),
]
_LISTED = "Of those that `latentdiff solvers` lists. Default: the model's own."
SolverName = Annotated[str | None, typer.Option(metavar="NAME", help=_LISTED)]
TimetableName = Annotated[str | None, typer.Option(metavar="NAME", help=_LISTED)]
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        help="A folder, a file or a Hugging Face name. Default: the bundled emoji model.",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE:SCALE", help="A LoRA to draw with; may be given again."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName, typer.Option(help="Of the networks.")]
NoMetadata = Annotated[
    bool, typer.Option("--no-metadata", help="Write nothing but pixels into the PNG files.")
]
