"""The settings of a run, kept with its checkpoints: a resumed run is the same run, or says so."""

from pathlib import Path

from pydantic import BaseModel

from latentdiff.errors import UserError
from latentdiff.learning.config import RunConfig

Settings = dict[str, object]
"""`section.key` -> value."""

# Say nothing of what is learned: they may change at any time.
_FREE = {
    *("out", "card", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"),
    *("max_bad_steps", "preset", "sample_prompts", "save_dtype", "gradient_checkpointing"),
    *("held_out.every", "held_out.keep", "held_out.patience"),
    *("optim.steps", "optim.accumulation", "data.workers", "data.latents", "unet.backend"),
}
# Say what is trained: with other ones a checkpoint is another model's.
_SHAPE = ("method.", "model.", "lora.", "inversion.", "inpaint.", "train_text.", "vae.", "unet.")
_SHAPE += ("noise.", "width.", "text.", "task.", "optimizer.", "objective.learned_variance.")


def settings_of(config: RunConfig) -> Settings:
    """Flatten the settings that determine the trained weights into JSON values by dotted name."""
    return _flat(config, "")


def _flat(section: BaseModel, before: str) -> Settings:
    found: Settings = {}
    plain = section.model_dump(mode="json")
    for name in type(section).model_fields:
        key, value = f"{before}{name}", getattr(section, name)
        if key in _FREE:
            continue
        found |= _flat(value, f"{key}.") if isinstance(value, BaseModel) else {key: plain[name]}
    return found


def check_settings(config: RunConfig, before: object, start: int) -> str | None:
    """Check that a run may resume from a checkpoint; return a line if its settings have changed.

    Args:
        before: the settings stored in the checkpoint; None in those of older versions.
        start: the step of the checkpoint.

    Raises:
        UserError: the checkpoint holds another model, or a finished run with other settings.
    """
    out, steps = config.out, config.optim.steps
    if start > steps:
        raise UserError(
            f"{out} was trained for {start} steps, more than optim.steps={steps}: name another out"
        )
    if not isinstance(before, dict):
        return None
    now = settings_of(config)
    other = [key for key in now if key in before and not _same(now[key], before[key])]
    shape = [key for key in other if f"{key}.".startswith(_SHAPE) and key != "lora.dropout"]
    if shape:
        key = shape[0]
        raise UserError(
            f"{out} has checkpoints of a run with {key}={_shown(before[key])}, not "
            f"{_shown(now[key])}: name another out"
        )
    if other and start >= steps:
        key = other[0]
        raise UserError(
            f"{out} is finished, and was trained with {key}={_shown(before[key])}, not "
            f"{_shown(now[key])}: name another out"
        )
    changes = [f"{key}={_shown(now[key])} instead of {_shown(before[key])}" for key in other]
    return f"from here on with {', '.join(changes)}" if changes else None


def _same(one: object, other: object) -> bool:
    """Tell if two values are equal, or name the same file or folder."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
