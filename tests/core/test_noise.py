"""Noise streams: a picture's noise is its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff import solvers
from latentdiff.diffusion import process, sampling, timetable
from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.oracles import mixture
from latentdiff.errors import UserError


@given(st.integers(0, 2**64), st.permutations(range(8)), st.integers(0, 50))
@settings(max_examples=25)
def test_a_picture_is_the_same_in_any_batch(seed: int, order: list[int], first: int) -> None:
    """Alone, in pairs, in eights and shuffled, two draws deep: equal to the bit."""
    eight = NoiseStreams(seed, first, 8)
    shuffled = NoiseStreams.of([(seed, first + i) for i in order])
    alone = [NoiseStreams(seed, first + i) for i in range(8)]
    pairs = [NoiseStreams(seed, first + i, 2) for i in range(0, 8, 2)]
    for _ in range(2):
        drawn = eight.draw((2, 5, 3))
        assert drawn.shape == (8, 2, 5, 3)
        assert torch.equal(shuffled.draw((2, 5, 3)), drawn[order])
        assert torch.equal(torch.cat([one.draw((2, 5, 3)) for one in alone]), drawn)
        assert torch.equal(torch.cat([two.draw((2, 5, 3)) for two in pairs]), drawn)


@pytest.mark.parametrize("name", ["ddpm", "euler-a", "heun", "dpmpp-2m"])
def test_a_run_is_the_same_in_any_batch(name: str) -> None:
    data = mixture([1, 2], [[0.0, 1.0], [1.0, -1.0]], [0.3, 0.5])
    where = process.create("flow")
    levels = timetable.create("trailing", where, 8)

    def end(noise: NoiseStreams) -> torch.Tensor:
        x = noise.draw((2, 4, 4)).double()
        return sampling.sample(data, solvers.create(name), levels, x, noise=noise)

    order = [3, 0, 7, 5, 1, 2, 6, 4]
    eight = end(NoiseStreams(9, count=8))
    torch.testing.assert_close(end(NoiseStreams.of([(9, i) for i in order])), eight[order])
    torch.testing.assert_close(end(NoiseStreams(9, first=5)), eight[5:6])
    torch.testing.assert_close(end(NoiseStreams(9, first=2, count=2)), eight[2:4])


def test_pictures_and_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    streams = [(s, i) for s in (0, 1, 2**32, 2**32 + 1) for i in range(4)]
    drawn = NoiseStreams.of(streams).draw((1, 8, 8)).flatten(1)
    distance = torch.cdist(drawn, drawn) + 99 * torch.eye(len(drawn))
    assert distance.min() > 3
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_of_the_field_keep_their_pictures() -> None:
    """Picture 0 of a seed is what torch's own generator draws from it; seeds can be a list."""
    ours = NoiseStreams([7, 8]).draw((1, 4, 4))
    for noise, seed in zip(ours, (7, 8), strict=True):
        expected = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noise, expected)


def test_noise_follows_x() -> None:
    drawn = NoiseStreams(1, count=2).like(torch.zeros(2, 3, 4, 5, dtype=torch.float64))
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn.float(), NoiseStreams(1, count=2).draw((3, 4, 5)))


def test_bad_seeds_are_refused() -> None:
    with pytest.raises(UserError, match="must not be negative"):
        NoiseStreams(-1)
    with pytest.raises(UserError, match="2 seeds were given for 3 pictures"):
        NoiseStreams([1, 2], count=3)
