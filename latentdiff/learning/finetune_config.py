"""The configuration of a fine-tune: what a method is set to unless the person says otherwise."""

from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from latentdiff.bundle import computes_halves
from latentdiff.diffusion.prediction import Prediction
from latentdiff.errors import UserError
from latentdiff.learning.config import RunConfig, Strict, put, validate
from latentdiff.learning.optimizers import OptimizerName
from latentdiff.learning.presets import OPTIM, Method, Preset, optim_of, preset_of, prior_of
from latentdiff.lora.training import Kind
from latentdiff.reading import decode


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
    latents: Path | None = None  # where they are kept, in place of OUT/cache
    mask: str | None = None


class LoraConfig(Strict):
    kind: Kind = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat | None = None
    targets: str | list[str] = "all"
    blocks: list[str] | None = None
    text_encoder: bool = False
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    layout: Literal["diffusers", "kohya"] = "diffusers"


class CaptionsConfig(Strict):
    """Reading of captions: the words of the style, which they end in, and tags between commas.

    `style_dropout` is the share of draws without the style's words, `content_dropout` that of the
    style's words alone. Tags are shuffled and each dropped with a probability, but the first
    `keep`.
    """

    style: str | None = None
    style_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    content_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    shuffle: bool = False
    keep: int = Field(default=0, ge=0)
    drop: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        shares = self.style_dropout + self.content_dropout
        if shares > 1:
            raise ValueError("style_dropout and content_dropout are more than 1 together")
        if shares and not self.style:
            raise ValueError("style_dropout and content_dropout need style, the style's words")
        return self


class InversionConfig(Strict):
    """New words, and the known word that each starts from."""

    tokens: list[str] = Field(default_factory=list)
    start_from: str | None = None


class ControlConfig(Strict):
    """The control pictures of `--method controlnet`, and the network that learns from them.

    They are made out of the training pictures (`kind`), or are files that a field of the metadata
    names (`field`). `embedding` are the widths of the layers that they go through, each but the
    first of which halves them; by default those of Stable Diffusion's, for the model's factor.
    `start` is a ControlNet to go on from, which has layers of its own. It is saved so that it says
    `strength` times as much as it learned to: under guidance more may be needed than without.
    """

    kind: Literal["canny", "scribble", "grey", "palette", "tile"] = "canny"
    field: str | None = None
    start: str | None = None
    strength: PositiveFloat = 1.0
    embedding: list[PositiveInt] | None = None
    attention: bool = True


class PriorConfig(Strict):
    """Pictures of the model's own that it must not unlearn (Ruiz et al. 2023, sec. 3.2).

    With the target "prediction" LoRA learns from them what the model says without it, which tells
    all that the model knows and no noise, without words too: `caption_dropout` is the share of
    that. With "picture" it learns the pictures. A prompt @FILE stands for the file's lines; None
    stands for captions of what the model knows (`presets.prior_captions`).
    """

    target: Literal["prediction", "picture"] = "picture"
    prompts: list[str] | None = None
    style: str | None = None
    count: PositiveInt = 400
    weight: PositiveFloat = 1.0
    steps: PositiveInt = 10
    guidance_scale: float = 4.0
    caption_dropout: float = Field(default=0.15, ge=0.0, le=1.0)

    @field_validator("prompts")
    @classmethod
    def _spell_out(cls, prompts: list[str] | None) -> list[str] | None:
        spelled: list[str] = []
        if prompts is None:
            return None
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


class HeldOutConfig(Strict):
    """Pictures that are not learned, to see when to stop.

    `fraction` None is a tenth of 20 pictures or more, at most 32, and none of fewer. `patience` is
    the number of measurements in a row that are no better after which a run stops; None: never.
    """

    fraction: float | None = Field(default=None, ge=0.0, lt=1.0)
    every: PositiveInt = 50
    keep: Literal["best", "last"] = "last"
    patience: PositiveInt | None = None


class FinetuneObjective(Strict):
    """None and "auto" are the model's own."""

    process: str | None = None
    prediction: Prediction | None = None
    times: Literal["uniform", "logit-normal"] = "uniform"
    times_min: float = Field(default=0.0, ge=0.0, lt=1.0)
    times_max: float = Field(default=1.0, gt=0.0, le=1.0)
    huber: PositiveFloat | None = None
    min_snr_gamma: PositiveFloat | Literal["auto"] | None = "auto"
    caption_dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    offset_noise: float = Field(default=0.0, ge=0.0)
    zero_terminal_snr: bool = False
    bound_weight: PositiveFloat = 0.001

    @model_validator(mode="after")
    def _times_are_a_range(self) -> Self:
        if self.times_min >= self.times_max:
            raise ValueError("times_min must be below times_max")
        return self

    @property
    def moves(self) -> bool:
        """True where the process or the prediction type of the base model is changed."""
        return bool(self.process or self.prediction or self.zero_terminal_snr)


class FinetuneConfig(RunConfig):
    method: Method
    model: str | None = None
    preset: Preset = "emoji"
    data: PicturesConfig
    captions: CaptionsConfig = CaptionsConfig()
    lora: LoraConfig = LoraConfig()
    inversion: InversionConfig = InversionConfig()
    control: ControlConfig = ControlConfig()
    prior: PriorConfig = PriorConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    objective: FinetuneObjective = FinetuneObjective()
    optimizer: OptimizerName = "adamw"
    text_lr: PositiveFloat | None = None
    train_text: bool = False
    inpaint: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False  # by torch.compile, which takes minutes at the first step
    save_dtype: Literal["float32", "float16"] = "float16"
    sample_prompts: list[str] = Field(default_factory=list)


def resolve(values: dict[str, object], source: str) -> FinetuneConfig:
    """Nested values with the defaults of their method filled in, checked as a whole.

    Args:
        source: origin of the values, for messages.

    Raises:
        UserError: an unknown key, an unfit value, or settings that do not go together.
    """
    values = {"method": "lora", **values}
    method = str(values["method"])
    data = values.get("data")
    if data is None:
        raise UserError("no pictures to learn from: give a folder, --data DIR")
    if isinstance(data, dict) and "root" in data:
        root = Path(str(data["root"]))
        named = root.parent if "*" in root.name else root  # shards/*.tar
        name = named.name if named.name not in ("", "..") else named.resolve().name
        values.setdefault("out", f"runs/{name}-{method}")
    values = _with_preset(values, method, source)
    if method == "lora":  # the empty caption would learn the new pictures, and guidance suffer
        given = {"caption_dropout": 0.0, **_section(values, "objective", source)}
        values = put(values, "objective", given)
        moves = any(given.get(key) for key in ("process", "prediction", "zero_terminal_snr"))
        target = "picture" if moves else "prediction"
        given = {"target": target, **_section(values, "prior", source)}
        if given["target"] == "prediction":
            given = {"weight": 3.0, **given}
        values = put(values, "prior", given)
    if method == "controlnet":  # Zhang et al. 2023, section 3.3: half of the prompts are empty
        given = {"caption_dropout": 0.5, **_section(values, "objective", source)}
        values = put(values, "objective", given)
    values.setdefault("precision", "bf16" if _has_bf16() else "no")
    config = validate(FinetuneConfig, values, source)
    _check_together(config)
    return config


def _with_preset(values: dict[str, object], method: str, source: str) -> dict[str, object]:
    """The values, and what the preset that they name, or else the model's own, begins with."""
    model, named = values.get("model"), values.get("preset")
    preset = preset_of(model if isinstance(model, str) else None) if named is None else str(named)
    if preset not in OPTIM:  # told when all is checked
        return values
    values = {**values, "preset": preset}
    optim = optim_of(preset, method, str(values.get("optimizer", "adamw")))
    for name, own in (("optim", optim), ("prior", prior_of(preset))):
        values = put(values, name, own | _section(values, name, source))
    return values


def _section(values: dict[str, object], name: str, source: str) -> dict[str, object]:
    given = values.get(name, {})
    if not isinstance(given, dict):
        raise UserError(f"{source}: {name} is a section, not a value")
    return given


def _has_bf16() -> bool:
    """Tell whether this machine has hardware support for bfloat16."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return computes_halves()


def _check_together(config: FinetuneConfig) -> None:
    tokens = config.inversion.tokens
    if config.method == "textual-inversion":
        if not tokens:
            raise UserError("textual inversion needs a new word to learn: --token '<my-style>'")
        if config.prior.prompts:
            raise UserError("a new word leaves other prompts as they are: leave prior.prompts out")
        if config.train_text:
            raise UserError("textual inversion trains the new words only: leave train_text out")
    elif tokens and config.method != "lora":
        told = "new words are for --method textual-inversion, or for lora beside it"
        raise UserError(f"{told}, not for {config.method}")
    if config.method == "dreambooth" and config.data.instance_prompt is None:
        raise UserError("dreambooth needs --instance-prompt, a name for the subject: 'a sks dog'")
    if config.method == "controlnet":
        _check_control(config)
    elif config.control != ControlConfig():
        raise UserError(f"control is for --method controlnet, not for {config.method}")
    if config.method != "lora" and config.prior.target == "prediction":
        raise UserError("only LoRA can be switched off: prior.target=prediction is for it alone")
    own = config.prior.target == "prediction" and config.prior.prompts != []
    if own and config.objective.moves:
        raise UserError(
            "the model's own predictions are not those of another objective: with "
            "objective.process, prediction or zero_terminal_snr set prior.target=picture"
        )
    _check_optimizer(config)
    if config.lora.kind in ("loha", "lokr") and config.lora.layout != "kohya":
        raise UserError(
            f"diffusers has no names for a {config.lora.kind}: --layout kohya (lora.layout=kohya)"
        )
    if config.method == "lora" and config.train_text:
        raise UserError("with LoRA the text encoder is trained by lora.text_encoder=true")


def _check_optimizer(config: FinetuneConfig) -> None:
    name, optim = config.optimizer, config.optim
    if name == "schedule-free" and (optim.schedule != "constant" or optim.ema_decay):
        raise UserError(
            "schedule-free averages the weights instead of a schedule: leave optim.schedule and "
            "optim.ema_decay out"
        )
    if name == "muon" and config.method not in ("full", "dreambooth"):
        raise UserError(f"muon is for whole matrices: --method full, not {config.method}")
    if config.text_lr is None:
        return
    if name == "prodigy":
        raise UserError("prodigy finds one rate for all parts: leave text_lr out")
    lora = config.method == "lora" and (config.lora.text_encoder or config.inversion.tokens)
    if not (config.train_text or lora):
        raise UserError("text_lr is the text encoder's, which this run does not train")


def _check_control(config: FinetuneConfig) -> None:
    """A ControlNet stands beside a model that stays as it is.

    Raises:
        UserError: a setting would change the model.
    """
    for name, given in {
        "train_text": config.train_text,
        "inpaint": config.inpaint,
        "prior.prompts": bool(config.prior.prompts),
        "objective.process, prediction and zero_terminal_snr": config.objective.moves,
    }.items():
        if given:
            raise UserError(f"--method controlnet leaves the model as it is: leave out {name}")
    told = config.control
    if told.field is not None and told.kind != "canny":
        raise UserError("control.field names pictures, and control.kind makes them: give one")
    if told.start is not None and (told.embedding is not None or not told.attention):
        raise UserError("control.start has layers of its own: leave out embedding and attention")
