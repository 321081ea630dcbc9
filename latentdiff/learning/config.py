"""Typed run configurations: a YAML file, `key=value` overrides, and no unknown key."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from latentdiff.errors import UserError


class Strict(BaseModel):
    """A configuration section; a key that it does not know and a number like .inf are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataConfig(Strict):
    """Choice of the pictures of a folder that take part, and their shares of the samples."""

    root: Path
    size: PositiveInt = 64
    where: dict[str, list[str]] = Field(default_factory=dict)
    held_out: dict[str, list[str]] = Field(default_factory=dict)
    held_out_fraction: float = Field(default=0.02, ge=0.0, lt=1.0)
    balance: list[str] = Field(default_factory=list)
    latents: Path | None = None  # made ahead by pipelines/batch.py; what is missing is encoded
    workers: int = Field(default=0, ge=0)  # processes that decode pictures ahead of stage 1


Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(Strict):
    """AdamW and its learning-rate curve; `batch_size` is the global one."""

    lr: PositiveFloat = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0.0)
    steps: PositiveInt = 10_000
    warmup: int = Field(default=100, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    batch_size: PositiveInt = 16
    accumulation: PositiveInt = 1
    clip: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0)


def _no_is_a_word(value: object) -> object:
    return "no" if value is False else value  # YAML reads a bare `no` as false


class CardConfig(Strict):
    """Facts for the model card that the run cannot know, and the Hub repository to push to."""

    licence: str = "unknown"
    push_to_hub: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


class RunConfig(Strict):
    """Settings shared by all stages: output folder, seed, precision, optimizer and intervals."""

    out: Path
    seed: int = Field(default=0, ge=0, lt=2**32)  # a word of every generator's key
    precision: Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(_no_is_a_word)] = "no"
    optim: OptimConfig = OptimConfig()
    log_every: PositiveInt = 20
    evaluate_every: PositiveInt = 1000
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: int = Field(default=2, ge=2)
    max_bad_steps: PositiveInt = 10
    card: CardConfig = CardConfig()

    @model_validator(mode="after")
    def _out_is_no_data(self) -> Self:
        """A later start would learn from grids of samples, where a folder has no metadata."""
        root = getattr(getattr(self, "data", None), "root", None)
        if root is not None and _resolved(self.out).is_relative_to(_resolved(root)):
            raise ValueError(
                f"out={self.out} lies inside the data, {root}, and would become data itself: name "
                "another with out=DIR (--out DIR of finetune.py)"
            )
        return self


class ModelRunConfig(RunConfig):
    """Settings of a run that begins as a model and ends as one.

    Attributes:
        model: what it begins as; null: the bundled model.
        save_dtype: of the weights in the end.
        sample_prompts: what is drawn on the way; the first captions where there are none.
    """

    data: DataConfig
    model: str | None = None
    save_dtype: Literal["float32", "float16"] = "float16"
    sample_prompts: list[str] = Field(default_factory=list)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


Config = TypeVar("Config", bound=BaseModel)


def load_config(kind: type[Config], path: Path, overrides: list[str]) -> Config:
    """Read a YAML file into `kind`, with `section.key=value` overrides (values are YAML too).

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    return validate(kind, override(read_yaml(path), overrides), str(path))


def read_yaml(path: Path) -> dict[str, object]:
    """The `key: value` lines of a YAML file.

    Raises:
        UserError: it is missing or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines")
    return values


def override(values: dict[str, object], overrides: list[str]) -> dict[str, object]:
    """`section.key=value` texts put into nested values.

    Raises:
        UserError: one of them has no such form.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"an override reads key=value, not {text!r}")
        try:
            values = put(values, key, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UserError(f"{key}: {' '.join(str(error).split())}") from None
    return values


def put(values: dict[str, object], key: str, value: object) -> dict[str, object]:
    """A copy of nested values in which `section.key` has this value.

    Raises:
        UserError: a section is a value.
    """
    section, dot, rest = key.partition(".")
    if not dot:
        return {**values, key: value}
    inside = values.get(section, {})
    if not isinstance(inside, dict):
        raise UserError(f"{key}: {section!r} is a value, not a section")
    return {**values, section: put(inside, rest, value)}


def validate(kind: type[Config], values: dict[str, object], source: str) -> Config:
    """Values as a configuration; `source` names where they are from.

    Raises:
        UserError: a key is unknown or missing, or a value does not fit.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        told = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            near = nearest_key(where, keys_of(kind))
            told = f"there is no such key{f'; did you mean {near}?' if near else ''}"
        raise UserError(": ".join(part for part in (source, where, told) if part)) from None


def keys_of(kind: type[BaseModel], section: str = "") -> list[str]:
    """Every key of a configuration, those of sections as `section.key`."""
    keys: list[str] = []
    for name, field in kind.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        inside = [one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)]
        keys += [f"{section}{name}"]
        keys += [key for one in inside for key in keys_of(one, f"{section}{name}.")]
    return keys


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The key that may have been meant: of the same name in another section, or spelled alike."""
    last = key.rpartition(".")[2]
    moved = [one for one in known if one.rpartition(".")[2] == last]
    return next(iter(moved or get_close_matches(key, known, n=1)), None)


def dump_config(config: BaseModel) -> str:
    """The resolved configuration as YAML, for the run's folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
