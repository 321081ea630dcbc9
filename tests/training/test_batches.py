"""Pictures out of other processes: the same ones, and no open file for each."""

from pathlib import Path

import torch
from scripts import picture_folder
from torch import Tensor

from latentdiff.data.examples import load_picture
from latentdiff.data.folder import read_folder
from latentdiff.errors import UserError
from latentdiff.learning.batches import PictureSet, shares_of_pictures
from latentdiff.learning.order import Key, SampleOrder, Shares


class Counting(PictureSet):
    """Writes down how many files its process has open, at each picture."""

    log: Path

    def __getitem__(self, index: Key) -> tuple[Tensor | UserError, Key]:
        with self.log.open("a") as file:
            file.write(f"{len(list(Path('/dev/fd').iterdir()))}\n")
        return super().__getitem__(index)


def test_a_worker_holds_no_open_file_for_each_picture_that_it_keeps(tmp_path: Path) -> None:
    examples = read_folder(picture_folder(tmp_path / "pictures", 120, 24))
    pictures = Counting(examples, 8)
    pictures.log = tmp_path / "open"
    shares = Shares(SampleOrder(len(examples), 0), range(30), 4, 0, 1)
    seen = list(shares_of_pictures(pictures, shares, 1))
    counts = [int(line) for line in pictures.log.read_text().split()]
    assert len(counts) == 120
    assert counts[-1] < counts[0] + 30
    for picture, (_, _, number) in seen[7]:
        assert torch.equal(picture, load_picture(examples[number], 8))
