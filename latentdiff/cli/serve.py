"""`latentdiff serve`: the page, and an HTTP server for clients of OpenAI's and A1111's calls."""

import os
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from latentdiff.cli import options
from latentdiff.cli.models import DtypeName, ModelOptions, check_autoencoder, preview_autoencoder
from latentdiff.cli.output import pixels_at_once
from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle


def serve(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LATENTDIFF_TOKEN",
            help="What clients must send as `Authorization: Bearer TOKEN`. Default: none at this "
            "machine's own addresses; at others a fresh one, which is printed.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Another name by which browsers reach this server; again for more."
        ),
    ] = None,
    max_side: Annotated[
        int | None,
        typer.Option(min=8, max=4096, help="Pixels of a side. Default: twice the model's own."),
    ] = None,
    model: options.Model = None,
    vae: options.Vae = None,
    lora: options.Loras = None,
    fast: options.Fast = False,
    device: options.Device = "auto",
    dtype: Annotated[
        DtypeName,
        typer.Option(
            help="Precision of the networks. Of auto on a CPU: bfloat16 where the CPU computes in "
            "it, whatever the model's size, else float32."
        ),
    ] = "auto",
    preview_vae: Annotated[
        str | None,
        typer.Option(
            "--preview-vae",
            metavar="FILE_OR_FOLDER",
            help="An autoencoder of the same latents to decode previews with, as TAESD. Default: "
            "the model's own up to 256 pixels; of larger models colours are estimated.",
        ),
    ] = None,
) -> None:
    """Serve a page that draws as you type, and the image calls of OpenAI and A1111.

    Needs: pip install 'latentdiff[serve]'. Nothing leaves this machine; prompts are not logged. A
    small model leaves a core to the browser, unless OMP_NUM_THREADS says how many threads draw.
    """
    try:
        from latentdiff.server.app import create_app
        from latentdiff.server.connections import server_of
        from latentdiff.server.guard import is_loopback
        from latentdiff.server.studio import Limits, Studio
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        raise UserError(f"{missing}: pip install 'latentdiff[serve]'") from None

    names = {"localhost", "127.0.0.1", "::1", host, *(allow_host or [])} - {"0.0.0.0", "::"}
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(16)
        print(f"token {token}", file=sys.stderr)
    chosen = ModelOptions(model, vae, loras=lora, fast=fast)
    chosen.check()
    if preview_vae is not None:
        check_autoencoder(preview_vae)
    listening = listen(host, port)
    pipe = chosen.load(device, swift(dtype, device))
    leave_a_core(pipe.bundle)
    by = None if preview_vae is None else preview_autoencoder(preview_vae, pipe.bundle)
    limits = Limits(max_side or 2 * max(pipe.bundle.size))
    studio = Studio(pipe, limits, pixels_at_once(pipe.bundle.device), by)
    app = create_app(studio, names, token)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}", flush=True)
    with listening:
        server_of(app).run(sockets=[listening])


def swift(dtype: DtypeName, device: str) -> DtypeName:
    """The precision to draw in while somebody waits: where `auto` means a CPU that computes in
    bfloat16, that; what is drawn keeps it among its settings."""
    import torch

    from latentdiff.bundle import computes_halves

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return "bfloat16" if dtype == "auto" and on_cpu and computes_halves() else dtype


def leave_a_core(bundle: "Bundle") -> None:
    """Draw with a thread fewer than there are, where the network is small and nobody said how many
    threads: it gains little by the last core, which a browser beside it needs."""
    import torch

    from latentdiff.bundle import is_large_network

    small = bundle.device.type == "cpu" and not is_large_network(bundle.network.module)
    threads = torch.get_num_threads()
    if small and threads > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads - 1)


def listen(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded: a port that is taken is told at once.

    Raises:
        UserError: it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError, TypeError) as error:  # a NUL in it is of a wrong type
        told = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise UserError(f"cannot listen at {host}:{port}: {told}; try another --port") from None
