"""Guidance by name, for those that one scale is enough to tell."""

import math
from typing import Protocol

from latentdiff.diffusion.denoiser import Condition, ConditionedDenoiser, Denoiser
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.guidance.cfg import classifier_free
from latentdiff.guidance.further import cfg_plus_plus, projected
from latentdiff.registry import check_name

_NAMES = ("cfg", "apg", "cfg++")


class Method(Protocol):
    """A guidance of one's own: what `classifier_free` and `projected` are, too.

    With `functools.partial` their other arguments are set: `partial(projected, momentum=-0.5)`.
    """

    def __call__(
        self,
        denoise: ConditionedDenoiser,
        positive: Condition,
        negative: Condition,
        /,
        *,
        scale: float,
    ) -> Denoiser: ...


def names() -> list[str]:
    """Every name that `create` knows."""
    return list(_NAMES)


def create(
    name: str | Method,
    denoise: ConditionedDenoiser,
    positive: Condition,
    negative: Condition | None,
    timetable: Timetable,
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, math.inf),
    blind: Condition | None = None,
    image_scale: float = 1.0,
) -> Denoiser:
    """Guide a denoiser by the method of this name; a scale of 1 is off for each of them.

    Args:
        name: "cfg", `classifier_free`; "apg", `projected`; or "cfg++", `cfg_plus_plus`, whose
            strength is the scale, below 1; or a method.
        denoise: the denoiser to guide.
        positive: what the pictures shall show, for B pictures.
        negative: what they shall not, or the empty condition; None where the scale is 1.
        timetable: of the run.
        scale: strength.
        rescale: of "cfg" alone.
        interval: of "cfg" alone.
        blind: the negative condition without its picture; None where image_scale is 1.
        image_scale: of "cfg" alone.

    Raises:
        UserError: unknown name, or what the method itself refuses.
    """
    if isinstance(name, str) or not callable(name):
        check_name("guidance", name, _NAMES)
    if name == "cfg" or scale == image_scale == 1:
        return classifier_free(
            denoise,
            positive,
            negative,
            scale=scale,
            rescale=rescale,
            interval=interval,
            blind=blind,
            image_scale=image_scale,
        )
    if rescale or interval != (0.0, math.inf) or image_scale != 1:
        raise UserError(
            f"guidance '{name!s:.40}' takes no rescale, no interval and no image guidance; "
            "'cfg' does."
        )
    if negative is None:
        raise UserError(f"guidance at scale {scale} needs a negative (or empty) condition.")
    if not isinstance(name, str):
        return name(denoise, positive, negative, scale=scale)
    if name == "apg":
        return projected(denoise, positive, negative, scale=scale)
    return cfg_plus_plus(denoise, positive, negative, timetable, strength=scale)
