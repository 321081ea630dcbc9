"""The arguments of a call, checked before anything is drawn."""

import math
import operator
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff import solvers
from latentdiff.bundle import Bundle
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import NoiseLevel
from latentdiff.diffusion.solver import Solver
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError, check_finite
from latentdiff.models.conditioner import SizeConditions
from latentdiff.solvers import aliases

MAX_STEPS = 1000
MAX_SIDE = 4096  # pixels
MAX_PIXELS = 2**28  # of all pictures of a call
_LARGEST_SIDE = 2**16  # that a network is told of
MAX_SEED = 2**64 - 1  # as elsewhere in this field


def whole(value: int, name: str, low: int, high: int) -> int:
    """Check that an argument is a whole number from `low` to `high`, and return it.

    Raises:
        UserError: it is not.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise UserError(f"{name}: must be a whole number from {low} to {high}, not {value!s:.40}.")
    return number


def listed(given: Sequence[object], name: str, example: str) -> None:
    """Check that an argument is a list, or another sequence that is no text.

    Raises:
        UserError: it is not.
    """
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UserError(f"{name}: give a list, as [{example}], not {type(given).__name__}.")


def solver_of(given: str | Solver, bundle: Bundle) -> Solver:
    """The solver that was given, or the one of that name, here or elsewhere.

    Raises:
        UserError: unknown name, or no solver.
    """
    if isinstance(given, str):
        name, timetable = aliases.resolve(given)
        if timetable is not None:
            raise UserError(f"solver: '{given!s:.60}' says a timetable, too; '{name}' is meant.")
        return solvers.create(name, bundle.process)
    if isinstance(given, type) or not isinstance(given, Solver):
        raise UserError(
            "solver: give a name of `latentdiff.solvers.names()` or a solver (for a scheduler of "
            f"diffusers, `DiffusersScheduler`), not {given!r:.60}."
        )
    return given


def run_of(
    solver: str | Solver | None, timetable: str | Timetable | None, bundle: Bundle, steps: int
) -> tuple[Solver, Timetable]:
    """The solver and the levels of a run, of names here or elsewhere.

    The model's own solver at its own times is set as the model's config says, and ends where that
    says; with any other solver, or at other times, the run ends at clean data.

    Raises:
        UserError: unknown names, other values, or a number of steps that a timetable does not have.
    """
    name, told = aliases.resolve_both(
        solver if isinstance(solver, str) else None,
        timetable if isinstance(timetable, str) else None,
    )
    solver = name if isinstance(solver, str) else solver
    timetable = told if timetable is None or isinstance(timetable, str) else timetable
    own_times = timetable is None or timetable == bundle.steps.spacing
    if own_times and (solver is None or solver == bundle.solver):
        return bundle.plan(steps)
    stepper = solver_of(bundle.solver if solver is None else solver, bundle)
    if timetable is None or isinstance(timetable, str):
        timetable = bundle.timetable(timetable, steps)
    check_levels(timetable)
    return stepper, timetable


def check_levels(timetable: Timetable) -> None:
    """Check that a timetable holds noise levels, and nothing else.

    Raises:
        UserError: it holds something else.
    """
    levels = timetable if isinstance(timetable, Sequence) else ()
    if not levels or not all(isinstance(level, NoiseLevel) for level in levels):
        raise UserError(
            "timetable: give a name, or noise levels as `latentdiff.diffusion.timetable.create` "
            f"does, not {timetable!r:.40}."
        )


def latent_shape(
    bundle: Bundle, height: int | None, width: int | None, count: int
) -> tuple[int, int, int, int]:
    """[B, C, h, w] of the latents of `count` pictures of that size, or the model's own.

    Raises:
        UserError: the size is out of range or no multiple of the autoencoder's factor.
    """
    sides: list[int] = []
    for name, given, own in zip(("height", "width"), (height, width), bundle.size, strict=True):
        side = whole(own if given is None else given, name, bundle.factor, MAX_SIDE)
        if side % bundle.factor:
            nearest = max(1, round(side / bundle.factor)) * bundle.factor
            raise UserError(
                f"{name}: must be a multiple of {bundle.factor} with this model, not {side}; "
                f"{nearest} is near."
            )
        sides.append(side)
    if count * sides[0] * sides[1] > MAX_PIXELS:
        raise UserError(
            f"{count} pictures of {sides[0]} x {sides[1]} are too many for one call; ask for fewer."
        )
    return count, bundle.latent_channels, sides[0] // bundle.factor, sides[1] // bundle.factor


def check_sizes(told: SizeConditions) -> None:
    """Check the numbers that a network is told of the pictures.

    Raises:
        UserError: one is no pair of whole numbers of pixels, or no finite number.
    """
    for name in told.given():
        value = getattr(told, name)
        if name.endswith("score"):
            check_finite(value, name)
            continue
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            what = "(top, left)" if name == "crop" else "(height, width)"
            raise UserError(f"{name}: give {what} in pixels, not {value!r:.40}.")
        for number in value:
            whole(number, name, 0 if name == "crop" else 1, _LARGEST_SIDE)


def seed_of(given: int | None) -> int:
    """The seed that was given; with None or -1, as elsewhere, a fresh one below 2^32.

    Raises:
        UserError: it is no seed.
    """
    if given is None or whole(given, "seed", -1, MAX_SEED) == -1:
        return secrets.randbelow(2**32)
    return operator.index(given)


def picture_streams(
    seed: int | Sequence[int] | None, first: int, generator: torch.Generator | None, count: int
) -> tuple[list[int], list[int]]:
    """Seed of each of `count` pictures, and its index within the seed.

    Raises:
        UserError: they are no seeds or no generator, or both were given.
    """
    first = whole(first, "first", 0, 2**62)
    if generator is not None:
        if seed is not None:
            raise UserError("seed and generator: give one of them, not both.")
        if not isinstance(generator, torch.Generator):
            raise UserError(
                f"generator: give one torch.Generator, not {type(generator).__name__}; a seed for "
                "each picture goes to `seed`."
            )
        drawn = torch.randint(2**32, (), generator=generator, device=generator.device)
        seed = int(drawn.item())
    if isinstance(seed, Sequence):
        seeds = [seed_of(one) for one in seed]
        if len(seeds) != count:
            raise UserError(f"seed: {len(seeds)} seeds were given for {count} pictures.")
        return seeds, [first] * count
    return [seed_of(seed)] * count, list(range(first, first + count))


def variation_seeds(
    given: int | Sequence[int] | None, strength: float, count: int
) -> list[int] | None:
    """The seed of each picture's variation, one after the other; None without variations.

    Raises:
        UserError: they are no seeds, not as many as pictures, or the strength is not in 0 .. 1; or
            a seed is given and no strength.
    """
    check_finite(strength, "variation_strength")
    if not 0 <= strength <= 1:
        raise UserError(f"variation_strength: must lie between 0 and 1, not {strength}.")
    if strength == 0:
        if given is not None:
            raise UserError("variation_seed: it needs a variation_strength above 0, up to 1.")
        return None
    if isinstance(given, Sequence):
        seeds = [seed_of(one) for one in given]
        if len(seeds) != count:
            raise UserError(f"variation_seed: {len(seeds)} were given for {count} pictures.")
        return seeds
    first = seed_of(given)
    return [(first + number) % (MAX_SEED + 1) for number in range(count)]


def varied(noise: Tensor, strength: float, seeds: list[int] | None) -> Tensor:
    """Standard noise, turned towards that of other seeds, picture by picture.

    The spherical interpolation of Shoemake 1985, section 3.3, at the right angle that independent
    noises have on average: so what comes out is standard normal, at every strength.

    Args:
        noise: [B, C, h, w].
        strength: 0 is that noise, 1 the first noise of the other seed.
        seeds: the other seed of each picture; None leaves the noise.
    """
    if seeds is None:
        return noise
    other = NoiseStreams(seeds).draw(noise.shape[1:]).to(noise)
    angle = strength * math.pi / 2
    return other if strength == 1 else math.cos(angle) * noise + math.sin(angle) * other


def first_noise(
    latents: Tensor | None,
    noise: NoiseStreams,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor:
    """Standard noise [B, C, h, w] in float32 on the device: the caller's, or fresh.

    Raises:
        UserError: the caller's is no tensor, has another shape, or is not finite.
    """
    if latents is None:
        return noise.draw(shape[1:]).to(device)
    if not isinstance(latents, Tensor):
        raise UserError(f"latents: must be a torch.Tensor, not {type(latents).__name__}.")
    if latents.shape != shape:
        raise UserError(f"latents: must be {list(shape)}, not {list(latents.shape)}.")
    if not bool(torch.isfinite(latents).all()):
        raise UserError("latents: they hold NaN or infinity.")
    return latents.to(device, torch.float32)
