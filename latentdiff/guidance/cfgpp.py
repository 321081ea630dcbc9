"""CFG++: guidance of the estimate alone, with unguided noise."""

from torch import Tensor

from latentdiff.diffusion.condition import Condition
from latentdiff.diffusion.denoiser import Branch, ConditionedDenoiser, Denoiser, Estimate
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError


def cfg_plus_plus(
    denoise: ConditionedDenoiser,
    positive: Condition,
    negative: Condition,
    timetable: Timetable,
    *,
    strength: float,
) -> Denoiser:
    """CFG++: Chung et al. 2025 (CFG++), algorithm 2: guided x_0, but unguided noise.

    DDIM's step with x_0 = negative + strength (positive - negative) and the noise of the negative
    condition is the step with classifier-free guidance of scale strength / (1 - q), where
    q = alpha sigma' / (alpha' sigma) and primes mark the next level; so it goes with every solver
    that draws no noise. (One that does keeps less of the negative condition's noise, and the
    step is one of a strength of up to (1 + q) times as much.) Between two levels of the timetable
    the scale is that of the interval.

    Args:
        denoise: the denoiser to guide.
        positive: what the pictures shall show, for B pictures.
        negative: what they shall not, or the empty condition.
        timetable: the timetable of the run.
        strength: their lambda, in 0..1. (It is no scale: 0 is the negative condition alone.)

    Raises:
        UserError: strength outside 0..1, or a timetable of fewer than two levels.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"the scale of 'cfg++' must lie between 0 and 1, as 0.6, not {strength}.")
    if len(timetable) < 2:
        raise UserError("CFG++ needs the timetable of the run.")
    falling = sorted(set(timetable), key=lambda level: level.log_snr)
    branches = [Branch("negative", negative), Branch("positive", positive)]

    def guided(x: Tensor, level: NoiseLevel) -> Estimate:
        away, towards = denoise(x, level, branches)
        index = sum(other.log_snr <= level.log_snr for other in falling[:-1])
        here, there = falling[max(index, 1) - 1], falling[max(index, 1)]
        shared = here.alpha * there.sigma / (there.alpha * here.sigma)
        return towards.with_x0(away.x0 + strength / (1 - shared) * (towards.x0 - away.x0))

    return guided
