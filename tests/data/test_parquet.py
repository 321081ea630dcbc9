"""Training on parquet files is training on the pictures that they hold."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lab import Lab, train

from latentdiff.data.examples import Example
from latentdiff.data.folder import read_folder
from latentdiff.data.packing import write_shards
from latentdiff.data.stream import find_shards
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A folder of twelve pictures, and the same as the Hub keeps it, five to a row group."""
    lab = Lab(tmp_path_factory.mktemp("parquet"))
    pictures = read_folder(lab.folder / "pictures")
    for number, part in enumerate((pictures[:7], pictures[7:])):
        path = lab.folder / f"hub/data/train-{number:05}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(part), path, row_group_size=5)
    return lab


def table(examples: list[Example]) -> pa.Table:
    image = [{"bytes": one.read(), "path": one.path.name} for one in examples]
    text = [one.captions[0] for one in examples]
    base = [one.fields["base"] for one in examples]
    return pa.table({"image": image, "text": text, "base": base})


def test_parquet_files_hold_the_folder_to_the_byte(lab: Lab, tmp_path: Path) -> None:
    folder, hub = read_folder(lab.folder / "pictures"), read_folder(lab.folder / "hub")
    assert [one.captions for one in hub] == [one.captions for one in folder]
    assert [one.read() for one in hub] == [one.read() for one in folder]
    assert [one.fields["base"] for one in hub] == [one.fields["base"] for one in folder]
    assert hub[11].open() == folder[11].open()
    (only,) = read_folder(lab.folder / "hub", where={"base": ("7",)})
    assert only.read() == folder[7].read()
    assert "train-00001-of-00002.parquet, 7.png" in only.name
    assert write_shards(lab.folder / "hub", tmp_path / "shards", 7) == 2
    again = read_folder(tmp_path / "shards")
    assert [one.read() for one in again] == [one.read() for one in folder]


@pytest.mark.slow
def test_training_on_parquet_files_is_training_on_the_folder(lab: Lab) -> None:
    sums: list[dict[str, str]] = []
    for name in ("pictures", "hub"):
        for stage in ("autoencoder", "diffusion", "finetune"):
            out = lab.folder / f"{name}-{stage}"
            overrides = [f"out={out}", f"data.root={lab.folder / name}", "optim.steps=1"]
            train(stage, lab.folder / f"{stage}.yaml", *overrides, "precision=no")
            manifest = (checkpoints(out / "checkpoints")[0] / "manifest.json").read_text()
            sums.append(json.loads(manifest)["sha256"])
            del sums[-1]["state.json"]  # a fine-tune's names its files
            for made in ("vae", "model"):  # by one stage for the next
                if (out / made).exists() and not (lab.folder / made).exists():
                    (lab.folder / made).symlink_to(out / made)
    assert sums[:3] == sums[3:]


def test_shards_are_streamed_from_a_folder_or_a_pattern(lab: Lab, tmp_path: Path) -> None:
    write_shards(lab.folder / "pictures", tmp_path, 5)
    by_range = find_shards(str(tmp_path / "{00000..00002}.tar"))
    assert find_shards(str(tmp_path)) == find_shards(str(tmp_path / "*.tar")) == by_range
    (tmp_path / "index.json").unlink()
    assert [shard.samples for shard in find_shards(str(tmp_path))] == [5, 5, 2]
    with pytest.raises(UserError, match=r"holds no shards \(\.tar\)"):
        find_shards(str(lab.folder / "hub"))


def test_a_broken_picture_in_a_cell_is_named(tmp_path: Path) -> None:
    image = [{"bytes": b"<html>", "path": None}, None, {"bytes": b"", "path": "c.png"}]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": image, "text": ["a", "b", "c"]}), path)
    told = ("row 0 is not a PNG", "row 1 of group 0 holds no picture", "c.png is empty")
    for example, message in zip(read_folder(path), told, strict=True):
        with pytest.raises(UserError, match=message):
            example.open()
