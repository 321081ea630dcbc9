"""`--control NETWORK:PICTURE[:SCALE]` and `--control-from KIND`: ControlNets of a command."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.bundle import Bundle
    from latentdiff.pipeline import Control


def parse_control(
    text: str,
    option: str = "--control",
    noun: str = "NETWORK",
    example: str = "models/canny:photo.png:0.8",
) -> tuple[Path, Path, float]:
    """The network, the picture and the scale of `--control`, or of an option like it.

    Raises:
        UserError: it does not name both.
    """
    rest, _, last = text.rpartition(":")
    try:
        scale = float(last)
    except ValueError:
        rest, scale = text, 1.0
    network, _, picture = rest.rpartition(":")
    if not network or not picture or not math.isfinite(scale):
        raise UserError(
            f"{option} {text!s:.200}: {noun}:PICTURE or {noun}:PICTURE:SCALE is meant, as "
            f"{example}."
        )
    return Path(network), Path(picture), scale


def check_controls(controls: Sequence[str], kinds: Sequence[str]) -> None:
    """Check the options before anything is loaded.

    Raises:
        UserError: no such network or picture, an unknown kind, or as many kinds as neither one nor
            the controls.
    """
    from latentdiff.editing.control_pictures import check_kind
    from latentdiff.formats.location import find_file

    for text in controls:
        network, picture, _ = parse_control(text)
        find_file(network, "ControlNet")
        find_file(picture, "picture")
    for kind in kinds:
        check_kind(kind)
    if kinds and not controls:
        raise UserError("--control-from is for --control: give both, or neither.")
    if kinds and len(kinds) not in (1, len(controls)):
        raise UserError(
            f"--control-from: {len(kinds)} kinds were given for {len(controls)} controls: give one "
            "for all, or one for each, in their order; 'picture' takes a picture as it is."
        )


def opened(controls: Sequence[str], kinds: Sequence[str], bundle: "Bundle") -> "list[Control]":
    """The controls of runs of a model, each of their networks read once, to where the model is,
    and their pictures opened.

    Raises:
        UserError: as `Control`.
    """
    from latentdiff.pipeline import Control
    from latentdiff.pipeline.controls import load_network

    parsed = [parse_control(text) for text in controls]
    each = [*kinds] if len(kinds) == len(parsed) else [*kinds, "picture"][:1] * len(parsed)
    device, dtype = bundle.device, bundle.network.dtype
    loaded = {
        network: load_network(network, device=device, dtype=dtype)
        for network in dict.fromkeys(network for network, _, _ in parsed)
    }
    return [
        Control(loaded[network], picture, scale, kind=kind)
        for (network, picture, scale), kind in zip(parsed, each, strict=True)
    ]


def fitted(controls: "Sequence[Control]", side: int) -> "list[Control]":
    """The same controls, whose pictures are no larger than the model's own.

    Args:
        controls: of a run that nothing else tells the size of.
        side: of the model's own pictures, in pixels.
    """
    from latentdiff.pictures import fit

    return [replace(one, image=[fit(own, side) for own in one.pictures]) for one in controls]


def files_of(controls: Sequence[str]) -> list[Path]:
    """The networks and the pictures of `--control`."""
    return [path for text in controls for path in parse_control(text)[:2]]


def about(controls: Sequence[str], kinds: Sequence[str]) -> dict[str, object]:
    """Record the controls for the text chunk of a picture."""
    record: dict[str, object] = {"controls": [by_name(*parse_control(one)) for one in controls]}
    return record | ({"control_from": [*kinds]} if kinds else {}) if controls else {}


def by_name(network: Path, picture: Path, scale: float) -> str:
    """Write what `parse_control` read, with the last parts of the paths alone."""
    return f"{network.name}:{picture.name}:{scale:g}"
