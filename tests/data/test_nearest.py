"""PSNR and the distance to the nearest real picture, against what they are by hand."""

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from latentdiff.metrics.nearest import blurred_thumbnails, nearest
from latentdiff.metrics.psnr import psnr


def pictures(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(3, 3, 4, 5)
    b = a + torch.tensor([0.2, 0.02, 2.0])[:, None, None, None]
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0, 0.0]))


def test_thumbnails_are_the_blurred_small_picture() -> None:
    batch = pictures(3, 32)
    ours = blurred_thumbnails(batch).reshape(3, 3, 32, 32)
    theirs = gaussian_filter(
        batch.numpy() / 255.0, (0, 0, 1, 1), mode="mirror", truncate=3.0
    ).astype(np.float32)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)
    as_float = blurred_thumbnails(batch.float() / 127.5 - 1)
    torch.testing.assert_close(as_float, ours.flatten(1))
    # antialiased: a fine checkerboard is grey at any size
    board = Image.fromarray(np.indices((128, 128)).sum(0).astype(np.uint8) % 2 * 255)
    grey = torch.from_numpy(np.array(board)).expand(1, 3, 128, 128)
    assert (blurred_thumbnails(grey) - 0.5).abs().max() < 0.01


def test_distances_are_root_mean_squares_and_copies_are_zero() -> None:
    levels = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 64, 64)
    flat = blurred_thumbnails(levels)
    distances, indices = nearest(flat[[0, 2]], flat[1:])
    torch.testing.assert_close(distances, torch.tensor([0.5, 0.0]))
    assert indices.tolist() == [0, 1]

    real = blurred_thumbnails(pictures(300, 40))
    distances, indices = nearest(real[[7, 299, 30]], real)
    assert distances.tolist() == [0.0, 0.0, 0.0]
    assert indices.tolist() == [7, 299, 30]
    queries = blurred_thumbnails(pictures(302, 40)[300:])
    direct = (queries[:, None] - real[None]).square().mean(-1).sqrt()
    distances, indices = nearest(queries, real)
    torch.testing.assert_close(distances, direct.min(1).values)
    assert indices.tolist() == direct.argmin(1).tolist()
