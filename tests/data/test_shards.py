"""Shards: what WebDataset reads and writes, the folder's own pictures, and nothing of a liar's."""

import io
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import Lab, train
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from latentdiff.cli import main
from latentdiff.data.examples import load_picture
from latentdiff.data.folder import read_folder
from latentdiff.data.packing import write_shards
from latentdiff.data.shards import expand
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A folder of twelve pictures, and the same in shards of five."""
    lab = Lab(tmp_path_factory.mktemp("shards"))
    assert write_shards(lab.folder / "pictures", lab.folder / "shards", 5) == 3
    return lab


def pattern(lab: Lab) -> Path:
    return lab.folder / "shards/{00000..00002}.tar"


def test_shards_hold_the_folder_to_the_byte(lab: Lab, tmp_path: Path) -> None:
    folder, shards = read_folder(lab.folder / "pictures"), read_folder(pattern(lab))
    assert [one.captions for one in shards] == [one.captions for one in folder]
    assert [one.read() for one in shards] == [one.read() for one in folder]
    assert [one.fields["base"] for one in shards] == [one.fields["base"] for one in folder]
    assert torch.equal(load_picture(shards[7], 16), load_picture(folder[7], 16))
    write_shards(lab.folder / "pictures", tmp_path / "again", 5)
    for path in sorted((lab.folder / "shards").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    index = json.loads((lab.folder / "shards/index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [5, 5, 2]
    only = read_folder(pattern(lab), where={"base": ("7", "11")})
    assert [one.fields["base"] for one in only] == ["7", "11"]


def test_webdataset_reads_ours_and_we_read_its(lab: Lab, tmp_path: Path) -> None:
    folder = read_folder(lab.folder / "pictures")
    theirs: Any = WebDataset(str(pattern(lab)), shardshuffle=False)
    samples = list(theirs)
    assert [sample["png"] for sample in samples] == [one.read() for one in folder]
    assert [json.loads(sample["json"])["text"] for sample in samples] == [
        one.captions[0] for one in folder
    ]
    with ShardWriter(str(tmp_path / "%05d.tar"), maxcount=7, verbose=0) as writer:
        for number, one in enumerate(folder):
            text = {"txt": one.captions[0]} if number % 2 else {"json": {"text": one.captions[0]}}
            writer.write({"__key__": f"a/{number:04}", "png": one.read(), **text})
    ours = read_folder(tmp_path / "{00000..00001}.tar")
    assert [(one.captions, one.read()) for one in ours] == [
        (one.captions, one.read()) for one in folder
    ]


def test_training_on_shards_is_training_on_the_folder(lab: Lab) -> None:
    sums: list[dict[str, str]] = []
    for name, root in (("folder", lab.folder / "pictures"), ("tars", pattern(lab))):
        for stage in ("autoencoder", "diffusion", "finetune"):
            out = lab.folder / f"{name}-{stage}"
            overrides = [f"out={out}", f"data.root='{root}'", "optim.steps=2", "precision=no"]
            train(stage, lab.folder / f"{stage}.yaml", *overrides)
            manifest = (checkpoints(out / "checkpoints")[0] / "manifest.json").read_text()
            sums.append(json.loads(manifest)["sha256"])
            del sums[-1]["state.json"]  # a fine-tune's names its files
            for made in ("vae", "model"):  # by one stage for the next
                if (out / made).exists() and not (lab.folder / made).exists():
                    (lab.folder / made).symlink_to(out / made)
    assert sums[:3] == sums[3:]


def test_a_pattern_is_what_a_shell_makes_of_it() -> None:
    assert [str(path) for path in expand(Path("a/{08..11}.tar"))] == [
        *("a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar")
    ]
    assert expand(Path("a/b.tar")) == [Path("a/b.tar")]
    assert len(expand(Path("{0..1}/{00..09}.tar"))) == 20
    with pytest.raises(UserError, match="empty"):
        expand(Path("{3..1}.tar"))


def test_the_command_line_writes_shards_and_replaces_nothing(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "shard", str(lab.folder / "pictures"), str(tmp_path / "out"), "--size=6"]
    assert main(arguments) == 0
    assert "2 shards" in capsys.readouterr().out
    before = (tmp_path / "out/00000.tar").stat().st_mtime_ns
    assert main(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "out/00000.tar").stat().st_mtime_ns == before


def test_shards_of_shards_and_of_odd_names_can_be_read_back(lab: Lab, tmp_path: Path) -> None:
    write_shards(lab.folder / "shards/00000.tar", tmp_path / "again", 5)
    before, again = (
        read_folder(lab.folder / "shards/00000.tar"),
        read_folder(tmp_path / "again/00000.tar"),
    )
    assert [one.read() for one in again] == [one.read() for one in before]
    assert [one.fields for one in again] == [one.fields for one in before]
    assert not {"span", "shard"} & set(again[0].fields)
    (tmp_path / "folder").mkdir()
    for number, kind in enumerate(("JPEG", "WebP", "PNG")):
        Image.new("RGB", (9, 9)).save(tmp_path / f"folder/{number}.jfif", kind)
    rows = [json.dumps({"file_name": f"{n}.jfif", "text": "black"}) for n in range(3)]
    (tmp_path / "folder/metadata.jsonl").write_text("\n".join(rows))
    write_shards(tmp_path / "folder", tmp_path / "out", 5)
    found = [one.fields["file_name"] for one in read_folder(tmp_path / "out/00000.tar")]
    assert found == ["000000000.jpg", "000000001.webp", "000000002.png"]
    (tmp_path / "folder/1.jfif").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"1\.jfif is no PNG, JPEG or WebP"):
        write_shards(tmp_path / "folder", tmp_path / "no", 5)


def tar_of(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([("a.json", b"{}")], "has no picture"),
        ([("a.png", b"x"), ("a.json", b"[1]")], "no JSON object"),
        ([("a.png", b"x"), ("a.json", b"{")], "cannot be read"),
        ([("a.png", b"x"), ("a.json", b"[" * 200_000)], "nested too deep"),
        ([("a.png", b"x"), ("a.json", b'{"n": ' + b"7" * 5000 + b"}")], "cannot be read"),
        ([("a.png", b"x"), ("a.txt", b"\xff")], "cannot be read"),
        ([("a.png", b"x")], "no caption"),
        ([], "holds no pictures"),
    ],
)
def test_a_faulty_shard_is_one_line(
    tmp_path: Path, members: list[tuple[str, bytes]], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as error:
        read_folder(tar_of(tmp_path / "bad.tar", *members))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="No such file"):
        read_folder(tmp_path / "{0..1}.tar")


def test_fields_of_a_folder_cannot_point_elsewhere(tmp_path: Path) -> None:
    """`span` and `shard` are ours in shards only; in a sample's JSON they are overwritten."""
    (tmp_path / "secret").write_bytes(b"secret")
    lie = {"file_name": "x.png", "text": "x", "shard": str(tmp_path / "secret"), "span": [0, 6]}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.png").write_bytes(b"picture")
    (tmp_path / "folder/metadata.jsonl").write_text(json.dumps(lie))
    tar = tar_of(tmp_path / "a.tar", ("a.png", b"picture"), ("a.json", json.dumps(lie).encode()))
    for root in (tmp_path / "folder", tar):
        (example,) = read_folder(root)
        assert example.read() == b"picture"


def listed(path: Path) -> str:
    """The complaint about a shard, or nothing where its pictures can be read."""
    try:
        assert all(len(example.read()) <= path.stat().st_size for example in read_folder(path))
    except UserError as error:
        return str(error)
    return ""


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 20_479), flip=st.integers(0, 20_479))
def test_a_damaged_shard_is_a_line_or_a_list_of_what_it_holds(cut: int, flip: int) -> None:
    with TemporaryDirectory() as name:
        members = [(f"{n}.{kind}", b"x" * 700) for n in range(6) for kind in ("png", "txt")]
        path = tar_of(Path(name) / "shard.tar", *members)
        data = bytearray(path.read_bytes())
        data[flip] ^= 1 << flip % 8
        path.write_bytes(data[: len(data) - cut])
        assert "\n" not in listed(path)
