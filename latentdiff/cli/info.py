"""`latentdiff info`: what is in a model."""

from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.cli import options
from latentdiff.cli.models import ModelOptions

if TYPE_CHECKING:
    from torch import nn

    from latentdiff.bundle import Bundle


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a file or a Hugging Face name. Default: the bundled emoji model.",
        ),
    ] = None,
    vae: options.Vae = None,
    prediction: options.PredictionName = None,
    variant: options.Variant = None,
) -> None:
    """Check a model, say what is in it and which solvers and timetables it can be run with."""
    from latentdiff import solvers
    from latentdiff.diffusion import timetable
    from latentdiff.formats.location import find

    bundle = ModelOptions(model, vae, prediction, variant).load("cpu", "auto").bundle
    folder = find(model)
    files = [folder] if folder.is_file() else folder.rglob("*")
    size = sum(path.stat().st_size for path in files if path.is_file())
    rows = [
        ("file" if folder.is_file() else "folder", f"{folder} ({size / 1e6:.1f} MB)"),
        *_describe(bundle),
    ]
    rows += [("solvers", " ".join(solvers.names())), ("timetables", " ".join(timetable.names()))]
    for name, text in rows:
        print(f"{name:<14}{text}")


def _describe(bundle: "Bundle") -> list[tuple[str, str]]:
    height, width = bundle.size
    latent = f"{bundle.latent_channels} x {height // bundle.factor} x {width // bundle.factor}"
    return [
        ("kind", bundle.kind),
        *_enlarges(bundle),
        *[(name, _part(module)) for name, module in bundle.modules.items()],
        ("window", f"{bundle.conditioner.window} tokens"),
        ("size", f"{height} x {width} pixels, latents {latent}"),
        ("process", _process(bundle)),
        ("prediction", bundle.prediction + " and variances" * bundle.network.learns_variance),
        ("timetable", bundle.steps.spacing),
        ("solver", bundle.solver),
    ]


def _enlarges(bundle: "Bundle") -> list[tuple[str, str]]:
    low = bundle.network.low_resolution
    if low is None:
        return []
    return [("enlarges", f"{low.ratio} times, noise levels 0 .. {low.max_noise_level}")]


def _part(network: "nn.Module") -> str:
    count = sum(parameter.numel() for parameter in network.parameters())
    kind = type(network)
    library = kind.__module__.partition(".")[0]
    ours = "" if library == "latentdiff" else f" of {library}"  # slower to start and to draw
    return f"{kind.__name__}{ours}, {count / 1e6:.2f} M parameters"


def _process(bundle: "Bundle") -> str:
    """Describe a process: its name if it is one of ours, else its kind; and its range."""
    from latentdiff.diffusion import process as processes

    own = bundle.process
    names = (name for name in processes.names() if processes.agree(processes.create(name), own))
    name = next(names, type(own).__name__)
    ends = [f"{own.log_snr(t):.2f}" for t in (own.t_min, own.t_max)]
    return f"{name}, t {own.t_min:g} .. {own.t_max:g}, log-SNR {ends[0]} .. {ends[1]}"
