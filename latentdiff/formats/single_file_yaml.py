"""`NAME.yaml` beside `NAME.safetensors`: CompVis' config of a checkpoint, as A1111 reads it.

Read or refused is what the shapes of the tensors cannot tell: prediction, schedule, scale of the
latents, attention heads, layer of the text encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import yaml
from yaml.nodes import Node

from latentdiff.errors import UserError
from latentdiff.formats.weights import blaming, first_line
from latentdiff.reading import read_text, reason

_MOST_BYTES = 2**16  # CompVis' own have about 2,000
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# latent-diffusion's "linear" is linear in the root of beta.
_SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}


@dataclass(frozen=True, slots=True)
class Told:
    """The settings of the YAML file beside a checkpoint, in keys of diffusers; empty without one.

    Attributes:
        scheduler: of the scheduler's config.
        vae: of the autoencoder's config.
        heads: of one head, ("number", n) or ("width", n); None where nothing is said.
        layer: the layer of the text encoder, in latent-diffusion's words; None likewise.
    """

    scheduler: Mapping[str, object]
    vae: Mapping[str, object]
    heads: tuple[str, int] | None = None
    layer: str | None = None


class _Loader(yaml.SafeLoader):
    """Loads YAML without aliases, a few of which, nested, stand for more than fits into memory."""

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            raise UserError("an alias (*name) is not read here: write its value in its place.")
        return super().compose_node(parent, index)


def read_beside(file: Path) -> Told:
    """Read the YAML file beside a checkpoint, if there is one.

    Raises:
        UserError: it cannot be read, or asks for what does not work here.
    """
    path = file.with_suffix(".yaml")
    if not path.is_file():
        return Told({}, {})
    with blaming(path):
        try:
            config = _Loader(read_text(path, _MOST_BYTES)).get_single_data()
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{reason(error)}.") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"not valid YAML ({first_line(error)}).") from error
        params = _section(config, "model", "params")
        unet = _section(params, "unet_config", "params")
        text = _section(params, "cond_stage_config", "params")
        return Told(_schedule(params), _scale(params), _heads(unet), _layer(text))


def _section(config: object, *names: str) -> Mapping[str, object]:
    """The part of a config below these names, empty where it is left out.

    Raises:
        UserError: one of them is no mapping.
    """
    for name in names:
        if config is None:
            return {}
        if not isinstance(config, dict):
            raise UserError(f"{name}: a mapping is needed above it.")
        config = config.get(name)
    if config is not None and not isinstance(config, dict):
        raise UserError(f"{names[-1]}: a mapping is needed.")
    return config or {}


def _schedule(params: Mapping[str, object]) -> dict[str, object]:
    told: dict[str, object] = {}
    if "parameterization" in params:
        told["prediction_type"] = _one_of(params, "parameterization", _PREDICTIONS)
    if "beta_schedule" in params:
        told["beta_schedule"] = _one_of(params, "beta_schedule", _SCHEDULES)
    if params.get("given_betas") is not None:
        raise UserError("given_betas: a schedule in numbers does not load here.")
    for theirs, ours in (("linear_start", "beta_start"), ("linear_end", "beta_end")):
        if theirs in params:
            told[ours] = _number(params, theirs)
    if "timesteps" in params:
        told["num_train_timesteps"] = _whole(params, "timesteps")
    return told


def _scale(params: Mapping[str, object]) -> dict[str, object]:
    return {"scaling_factor": _number(params, "scale_factor")} if "scale_factor" in params else {}


def _heads(unet: Mapping[str, object]) -> tuple[str, int] | None:
    for key, kind in (("num_head_channels", "width"), ("num_heads", "number")):
        if key in unet and (count := _whole(unet, key)) > 0:
            return kind, count
    return None


def _layer(text: Mapping[str, object]) -> str | None:
    if text.get("layer") is None:
        return None
    return _one_of(text, "layer", {name: name for name in ("last", "penultimate")})


def _one_of(params: Mapping[str, object], key: str, known: Mapping[str, str]) -> str:
    value = params[key]
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{key}: {short(value)} does not work here; {', '.join(known)} do.")
    return known[value]


def _number(params: Mapping[str, Any], key: str) -> float:
    """A number, which YAML takes for a text where it is written as 1e-4."""
    try:
        number = float(params[key])
        if isinstance(params[key], bool) or not 0 < abs(number) <= 1e6:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key}: {short(params[key])} is no sensible number.") from None
    return number


def _whole(params: Mapping[str, Any], key: str) -> int:
    number = _number(params, key)
    if not number.is_integer():
        raise UserError(f"{key}: {short(params[key])} is no whole number.")
    return int(number)
