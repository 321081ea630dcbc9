"""Seeds as others use them: of 64 bits."""

import hashlib

import pytest
import torch

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.errors import UserError
from latentdiff.pipeline.arguments import picture_streams

WIDE = [2**32, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1]


def test_seeds_go_to_64_bits() -> None:
    for seed in (0, 7, *WIDE):
        assert picture_streams(seed, 0, None, 2) == ([seed, seed], [0, 1])
    assert picture_streams(WIDE, 0, None, len(WIDE))[0] == WIDE
    for seed in (-2, 2**64):
        with pytest.raises(UserError, match=r"from -1 to 18446744073709551615, not -?\d+"):
            picture_streams(seed, 0, None, 1)
        with pytest.raises(UserError, match="seed: must be a whole number"):
            picture_streams([seed], 0, None, 1)


def test_minus_one_is_a_fresh_seed() -> None:
    """As with ComfyUI and A1111; the output says which it was."""
    seeds, indices = picture_streams([-1, 5, -1, -1], 0, None, 4)
    assert seeds[1] == 5
    assert len({seeds[0], *seeds[2:]}) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)
    one, other = (picture_streams(-1, 3, None, 2) for _ in range(2))
    assert one[0][0] == one[0][1] != other[0][0]
    assert (indices, one[1]) == ([0] * 4, [3, 4])


def test_pictures_of_wide_seeds_differ_and_those_of_old_ones_stay() -> None:
    drawn = NoiseStreams([0, *WIDE]).draw((1, 8, 8)).flatten(1)
    assert (torch.cdist(drawn, drawn) + 99 * torch.eye(len(drawn))).min() > 3
    # seeds beyond 32 bits have been hashed so since they were first taken
    for seed in (2**32, 2**62):
        digest = hashlib.blake2b(f"{seed}:0".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        (noise,) = NoiseStreams(seed).draw((1, 4, 4))
        assert torch.equal(noise, torch.randn((1, 4, 4), generator=generator))
