"""The guidances that a call names by one word and one scale."""

import math
from typing import Protocol

from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import ConditionedDenoiser, Denoiser, Estimate, bind
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.guidance.apg import projected
from latentdiff.guidance.cfg import bounds, classifier_free
from latentdiff.guidance.cfgpp import cfg_plus_plus
from latentdiff.registry import check_name

_NAMES = ("cfg", "apg", "cfg++")
ALWAYS = (0.0, math.inf)


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


def default_scale(name: str | Method) -> float:
    """The scale of a run that says none: 4; of "cfg++" 0.6, within its range of 0 .. 1."""
    return 0.6 if name == "cfg++" else 4.0


def create(
    name: str | Method,
    denoise: ConditionedDenoiser,
    positive: Condition,
    negative: Condition | None,
    timetable: Timetable,
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = ALWAYS,
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
        timetable: the timetable of the run.
        scale: strength.
        rescale: for "cfg" alone.
        interval: guide only where low < sigma / alpha <= high; elsewhere the positive condition
            alone is evaluated.
        blind: the negative condition without its picture; None where image_scale is 1.
        image_scale: for "cfg" alone.

    Raises:
        UserError: unknown name, or what the method itself refuses.
    """
    check(name, scale=scale, rescale=rescale, interval=interval, image_scale=image_scale)
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
    if negative is None:
        raise UserError(f"guidance at scale {scale} needs a negative (or empty) condition.")
    if not isinstance(name, str):
        guided = name(denoise, positive, negative, scale=scale)
    elif name == "apg":
        guided = projected(denoise, positive, negative, scale=scale)
    else:
        guided = cfg_plus_plus(denoise, positive, negative, timetable, strength=scale)
    return within(interval, guided, bind(denoise, positive))


def check(
    name: str | Method,
    *,
    scale: float,
    rescale: float = 0.0,
    interval: tuple[float, float] = ALWAYS,
    image_scale: float = 1.0,
) -> None:
    """Check before anything is loaded that these settings of a guidance go together.

    Raises:
        UserError: they do not; the line says which.
    """
    if isinstance(name, str) or not callable(name):
        check_name("guidance", name, _NAMES)
    bounds(interval)
    if name != "cfg" and (scale, image_scale) != (1, 1) and (rescale or image_scale != 1):
        raise UserError(
            f"guidance '{name!s:.40}' takes no rescale and no image guidance; 'cfg' does."
        )
    if name == "cfg++" and not 0 <= scale <= 1:
        raise UserError(f"the scale of 'cfg++' must lie between 0 and 1, as 0.6, not {scale}.")


def within(interval: tuple[float, float], guided: Denoiser, unguided: Denoiser) -> Denoiser:
    """Guide only where low < sigma / alpha <= high: Kynkäänniemi et al. 2024, eq. 6.

    Raises:
        UserError: no interval.
    """
    low, high = bounds(interval)
    if (low, high) == ALWAYS:
        return guided

    def inside(x: Tensor, level: NoiseLevel) -> Estimate:
        return (guided if low < level.ratio <= high else unguided)(x, level)

    return inside
