"""The configuration of a fine-tune: what a method is set to unless the person says otherwise."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from latentdiff.diffusion.prediction import Prediction
from latentdiff.errors import UserError
from latentdiff.learning.config import RunConfig, Strict, put, validate
from latentdiff.lora.file import Layout
from latentdiff.reading import decode

Method = Literal["lora", "full", "dreambooth", "textual-inversion"]


class PicturesConfig(Strict):
    """The folder, what becomes of faulty pictures, and how each picture is cut to size."""

    root: Path
    where: dict[str, list[str]] = Field(default_factory=dict)
    instance_prompt: str | None = None
    bad: Literal["refuse", "skip"] = "refuse"
    least_side: PositiveInt | None = None
    size: PositiveInt | None = None
    crops: PositiveInt = 1
    flip: bool = False
    buckets: bool = False


class LoraConfig(Strict):
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    targets: str | list[str] = "all"
    text_encoder: bool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    layout: Layout = "diffusers"


class InversionConfig(Strict):
    """New words, and the known word that each starts from."""

    tokens: list[str] = Field(default_factory=list)
    start_from: str | None = None


class PriorConfig(Strict):
    """Pictures of the model's own that it must not unlearn (Ruiz et al. 2023, sec. 3.2).

    With the target "prediction" LoRA learns from them what the model says without it, which tells
    all that the model knows and no noise, without words too: `caption_dropout` is the share of
    that. With "picture" it learns the pictures. A prompt @FILE stands for the file's lines.
    """

    target: Literal["prediction", "picture"] = "picture"
    prompts: list[str] = Field(default_factory=list)
    count: PositiveInt = 400
    weight: PositiveFloat = 1.0
    steps: PositiveInt = 10
    guidance_scale: float = 4.0
    caption_dropout: float = Field(default=0.15, ge=0.0, le=1.0)

    @field_validator("prompts")
    @classmethod
    def _spell_out(cls, prompts: list[str]) -> list[str]:
        spelled: list[str] = []
        for prompt in prompts:
            if prompt.startswith("@"):
                spelled += _lines(Path(prompt[1:]))
            else:
                spelled.append(prompt)
        return spelled


def _lines(path: Path) -> list[str]:
    """Read the lines of a file that are not blank.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = decode(path.read_bytes()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts of {path}: {error}") from None
    return [line.strip() for line in lines if line.strip()]


class FinetuneObjective(Strict):
    """None and "auto" are the model's own."""

    process: str | None = None
    prediction: Prediction | None = None
    times: Literal["uniform", "logit-normal"] = "uniform"
    min_snr_gamma: PositiveFloat | Literal["auto"] | None = "auto"
    caption_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    offset_noise: float = Field(default=0.0, ge=0.0)
    zero_terminal_snr: bool = False
    bound_weight: PositiveFloat = 0.001

    @property
    def moves(self) -> bool:
        """True where the process or the prediction type of the base model is changed."""
        return bool(self.process or self.prediction or self.zero_terminal_snr)


class FinetuneConfig(RunConfig):
    method: Method
    model: str | None = None
    data: PicturesConfig
    lora: LoraConfig = LoraConfig()
    inversion: InversionConfig = InversionConfig()
    prior: PriorConfig = PriorConfig()
    objective: FinetuneObjective = FinetuneObjective()
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    train_text: bool = False
    inpaint: bool = False
    gradient_checkpointing: bool = False
    save_dtype: Literal["float32", "float16"] = "float16"
    sample_prompts: list[str] = Field(default_factory=list)


# What each method needs to work on a few dozen pictures; larger models want smaller rates.
_OPTIM: dict[Method, dict[str, object]] = {
    "lora": {"lr": 2e-3, "steps": 700, "batch_size": 24, "ema_decay": 0.0},
    "full": {"lr": 1e-4, "steps": 400, "batch_size": 32, "ema_decay": 0.99},
    "dreambooth": {"lr": 5e-5, "steps": 400, "batch_size": 16, "ema_decay": 0.0},
    "textual-inversion": {
        "lr": 5e-3,
        "steps": 400,
        "batch_size": 16,
        "ema_decay": 0.0,
        "weight_decay": 0.0,
    },
}


def resolve(values: dict[str, object], source: str) -> FinetuneConfig:
    """Nested values with the defaults of their method filled in, checked as a whole.

    Args:
        source: origin of the values, for messages.

    Raises:
        UserError: an unknown key, an unfit value, or settings that do not go together.
    """
    values = {"method": "lora", **values}
    method = values["method"]
    chosen = _OPTIM.get(str(method), {}) | {"warmup": 20}  # pyright: ignore[reportCallIssue, reportArgumentType]
    given = _section(values, "optim", source)
    for key, value in chosen.items():
        if key not in given:
            values = put(values, f"optim.{key}", value)
    data = values.get("data")
    if data is None:
        raise UserError("no pictures to learn from: give a folder, --data DIR")
    if isinstance(data, dict) and "root" in data:
        root = Path(str(data["root"]))
        named = root.parent if "*" in root.name else root  # shards/*.tar
        name = named.name if named.name not in ("", "..") else named.resolve().name
        values.setdefault("out", f"runs/{name}-{method}")
    if method == "lora":  # the empty caption would learn the new pictures, and guidance suffer
        given = {"caption_dropout": 0.0, **_section(values, "objective", source)}
        values = put(values, "objective", given)
        given = {"target": "prediction", **_section(values, "prior", source)}
        if given["target"] == "prediction":
            given = {"weight": 3.0, **given}
        values = put(values, "prior", given)
    values.setdefault("precision", "bf16" if _has_bf16() else "no")
    config = validate(FinetuneConfig, values, source)
    _check_together(config)
    return config


def _section(values: dict[str, object], name: str, source: str) -> dict[str, object]:
    given = values.get(name, {})
    if not isinstance(given, dict):
        raise UserError(f"{source}: {name} is a section, not a value")
    return given


def _has_bf16() -> bool:
    """Tell whether this machine has hardware support for bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def _check_together(config: FinetuneConfig) -> None:
    tokens = config.inversion.tokens
    if config.method == "textual-inversion":
        if not tokens:
            raise UserError("textual inversion needs a new word to learn: --token '<my-style>'")
        if config.prior.prompts:
            raise UserError("a new word leaves other prompts as they are: leave prior.prompts out")
        if config.train_text:
            raise UserError("textual inversion trains the new words only: leave train_text out")
    elif tokens:
        raise UserError(f"new words are for --method textual-inversion, not for {config.method}")
    if config.method == "dreambooth":
        if config.data.instance_prompt is None:
            raise UserError(
                "dreambooth needs --instance-prompt, a name for the subject: 'a sks dog'"
            )
        if not config.prior.prompts:
            raise UserError("dreambooth needs --prior-prompt, the subject's kind: 'a dog'")
    if config.method != "lora" and config.prior.target == "prediction":
        raise UserError("only LoRA can be switched off: prior.target=prediction is for it alone")
    if config.prior.prompts and config.prior.target == "prediction" and config.objective.moves:
        raise UserError(
            "the model's own predictions are not those of another objective: with "
            "objective.process, prediction or zero_terminal_snr set prior.target=picture"
        )
    if config.method == "lora" and config.train_text:
        raise UserError("with LoRA the text encoder is trained by lora.text_encoder=true")
