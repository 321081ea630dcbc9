"""Data that is meant to harm: only regular files are read, bounded, and each fault is a line."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import tiny_clip

from latentdiff.data import row_groups
from latentdiff.data.examples import Example, load_pictures
from latentdiff.data.folder import list_folder, read_folder
from latentdiff.data.packing import write_shards
from latentdiff.data.shards import expand
from latentdiff.data.stream import find_shards
from latentdiff.errors import UserError
from latentdiff.learning.captions import Captions
from latentdiff.models.conditioner import TextConditioner

GIB = 2**30


def picture(path: Path, colour: str = "red") -> Path:
    Image.new("RGB", (32, 32), colour).save(path)
    return path


def refused(work: Callable[[], object], most: int = 300) -> str:
    """The line; the process has grown by less than so many MB meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < most * 1024
    return str(caught.value)


@pytest.fixture(autouse=True)
def bell() -> Iterator[None]:
    """Turn a wait without end into an error."""

    def ring(*_: object) -> None:
        raise TimeoutError("it waits")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(200)
    yield
    signal.alarm(0)


@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "a.txt", "x.tar", "x.parquet"]
)
def test_a_pipe_is_refused_without_waiting(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / name)
    root = tmp_path / name if name.startswith("x") else tmp_path
    assert f"{name} cannot be read: not a regular file" in refused(lambda: read_folder(root))


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "/proc/self/mem"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "a.txt", "x.tar", "x.parquet"])
def test_a_link_to_a_device_is_refused(tmp_path: Path, name: str, target: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).symlink_to(target)
    root = tmp_path / name if name.startswith("x") else tmp_path
    assert "cannot be read" in (told := refused(lambda: read_folder(root))) or (
        "lies outside the folder" in told
    )


def test_metadata_and_captions_larger_than_any_are_not_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with (tmp_path / "a.txt").open("w") as file:
        file.truncate(8 * GIB)
    assert "a.txt cannot be read: larger than 1 MiB" in refused(lambda: read_folder(tmp_path))
    with (tmp_path / "metadata.jsonl").open("w") as file:
        file.truncate(GIB - 1)  # one line of NUL
    assert "line 1: longer than 16 MiB" in refused(lambda: read_folder(tmp_path))
    with (tmp_path / "metadata.jsonl").open("w") as file:
        file.truncate(GIB + 1)
    assert "metadata.jsonl cannot be read: larger than 1024 MiB" in refused(
        lambda: read_folder(tmp_path)
    )


def nulls(path: Path) -> None:
    table = pa.table({"file_name": pa.nulls(6_000_000, pa.string())})
    pq.write_table(table, path, compression="zstd")


def one_large_value_often(path: Path) -> None:
    """A dictionary of one value of 1 MB, and 400 rows of it."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), ["x" * 10**6])
    pq.write_table(pa.table({"file_name": values}), path, compression="zstd")


def lists_of_one_large_value(path: Path) -> None:
    kind = pa.dictionary(pa.int32(), pa.string())
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 400, pa.int32()), ["x" * 10**6])
    lists = pa.ListArray.from_arrays(pa.array([0, 400], pa.int32()), values.cast(kind))
    pq.write_table(pa.table({"file_name": ["a.png"], "captions": lists}), path)


def one_large_value(path: Path) -> None:
    values = pa.array([b"\0" * (3 * 10**8)], pa.large_binary())
    table = pa.table({"file_name": ["a.png"], "x": values})
    pq.write_table(table, path, compression="zstd", write_statistics=False, use_dictionary=False)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (nulls, "has 6,000,000 rows; at most 5,000,000 are read"),
        (one_large_value_often, "row group 0 has more than 256 MiB"),
        (lists_of_one_large_value, "row group 0 has more than 256 MiB"),
        (one_large_value, "row group 0 has more than 256 MiB"),
    ],
)
def test_a_small_parquet_file_that_unfolds_is_refused_by_its_footer_or_as_it_unfolds(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    picture(tmp_path / "a.png")
    write(tmp_path / "metadata.parquet")
    assert (tmp_path / "metadata.parquet").stat().st_size < 10**6
    assert message in refused(lambda: read_folder(tmp_path), 700)


def test_a_row_group_of_pictures_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = [{"bytes": os.urandom(1000), "path": f"{n}.png"} for n in range(40)]
    table = pa.table({"image": image, "text": [f"{n}" for n in range(40)]})
    pq.write_table(table, tmp_path / "x.parquet")
    examples = read_folder(tmp_path)
    assert [example.read() for example in examples] == [one["bytes"] for one in image]
    monkeypatch.setattr(row_groups, "_NEWEST", row_groups._Newest())
    monkeypatch.setattr(row_groups, "MAX_PICTURES", 20_000)
    assert "row_group_size=100" in refused(examples[0].read)


def test_row_groups_are_read_once_in_order_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    whole = row_groups._read_group

    def counted(path: Path, cell: row_groups.Cell) -> object:
        read.append(cell.group)
        return whole(path, cell)

    monkeypatch.setattr(row_groups, "_read_group", counted)
    monkeypatch.setattr(row_groups, "_KEPT", 0)
    image: list[dict[str, object]] = []
    for number in range(12):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(buffer, "PNG")
        image.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": image, "text": ["x"] * 12})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    pictures = load_pictures(read_folder(tmp_path), 4, progress=False)
    assert pictures[:, 0, 0, 0].tolist() == [20 * number for number in range(12)]
    assert set(read) == {0, 1, 2, 3}
    assert len(row_groups._NEWEST.groups) == 1


def headers_within_headers() -> bytes:
    """A long name whose next header is a long name, and so on."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 4
    return (member.tobuf(tarfile.GNU_FORMAT) + b"abc\0" + bytes(508)) * 3000


def header_of_gigabytes() -> bytes:
    member = tarfile.TarInfo("PaxHeaders/a")
    member.type, member.size = tarfile.XHDTYPE, 6 * GIB
    return member.tobuf(tarfile.GNU_FORMAT)


def size_below_zero() -> bytes:
    """A member that ends before it begins (CVE-2025-8194): the same header again and again."""
    body = b"15 size=-1024\n\n"
    pax = tarfile.TarInfo("PaxHeaders/a.png")
    pax.type, pax.size = tarfile.XHDTYPE, len(body)
    member = tarfile.TarInfo("a.png")
    return pax.tobuf() + body.ljust(512, b"\0") + member.tobuf() + bytes(1024)


def beyond_the_end() -> bytes:
    member = tarfile.TarInfo("a.png")
    member.size = 10**6
    return member.tobuf() + bytes(2048)


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (headers_within_headers, None),
        (header_of_gigabytes, 7 * GIB),
        (size_below_zero, None),
        (beyond_the_end, None),
    ],
)
def test_headers_of_a_liar_are_one_line(
    tmp_path: Path, build: Callable[[], bytes], size: int | None
) -> None:
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(build())
        if size is not None:
            file.truncate(size)  # sparse
    told = refused(lambda: read_folder(tmp_path / "x.tar"))
    assert "x.tar cannot be read" in told or "holds no pictures" in told


@pytest.mark.parametrize(
    "pattern",
    [
        "/x/{00000..99999999}.tar",
        "/x/{0..999}/{0..999}/{0..9}.tar",
        f"/x/{{0..{'9' * 5000}}}.tar",
        f"/x/{{{'0' * 5000}1..2}}.tar",
    ],
)
def test_a_range_is_counted_before_it_is_spelled_out(pattern: str) -> None:
    assert "more than 1,000,000 files" in (told := refused(lambda: expand(Path(pattern)))) or (
        "counts too far" in told
    )


@pytest.mark.parametrize("samples", ["0", "-5", "Infinity", "NaN", "true", "1e99", '"3"', "2.5"])
def test_numbers_of_an_index_are_numbers_of_samples(tmp_path: Path, samples: str) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(picture(tmp_path / "0.png"), "0.png")
    row = f'{{"name": "x.tar", "samples": {samples}, "sha256": "z"}}'
    (tmp_path / "index.json").write_text(f'{{"shards": [{row}]}}')
    if samples == "true":
        return  # JSON's true is Python's 1, and a shard of one is what this is
    assert "is no index of shards" in refused(lambda: find_shards(str(tmp_path / "x.tar")))


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "\ud83d.png", "a/" * 3000 + "b.png"])
def test_names_that_no_file_can_have_are_missing_files(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    assert "are missing" in refused(lambda: read_folder(tmp_path))
    (example,) = list_folder(tmp_path)
    assert "cannot open picture" in refused(example.open)
    assert "cannot open picture" in refused(example.read)


def test_half_a_character_is_a_line_at_every_door(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    row = '{"file_name": "a.png", "text": "half \\ud83d emoji", "note": "\\ud83d"}'
    (tmp_path / "metadata.jsonl").write_text(row)
    for work in (
        lambda: read_folder(tmp_path),
        lambda: write_shards(tmp_path, tmp_path / "out", 4),
        lambda: Captions(TextConditioner(tiny_clip()), [["half \ud83d emoji"]], 0.0, 0),
    ):
        assert "half a character (U+D83D)" in refused(work)
    (tmp_path / "metadata.jsonl").write_text(row.replace("half \\ud83d", "whole"))
    assert write_shards(tmp_path, tmp_path / "out", 4) == 1
    (example,) = read_folder(tmp_path / "out/00000.tar")
    assert example.captions == ("whole emoji",)


@pytest.mark.parametrize("name", ["\x1b]0;gone\x07.png", "a\nb.png", "\x9b2J.png", "\u202egnp.a"])
def test_no_name_reaches_a_terminal_as_a_command(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.png").write_bytes(b"<html>")
    told = refused(Example(tmp_path / name, (), {}).open)
    assert told.isprintable()
    assert refused(Example(tmp_path / "x.png", (), {}).open).count("x.png") == 1


def test_large_pictures_are_decoded_one_at_a_time() -> None:
    """Six of 25 million pixels and 100 KB, with six threads: 1.3 GB if they are all open."""
    code = """
import os, resource, tempfile
from pathlib import Path
from PIL import Image
os.cpu_count = lambda: 6
from latentdiff.data.check import check_pictures
from latentdiff.data.folder import list_folder
root = Path(tempfile.mkdtemp())
for n in range(6):
    Image.new("L", (5000, 5000), n).save(root / f"{n}.png")
    Image.new("RGB", (64, 64), (n, 0, 0)).save(root / f"small{n}.png")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checked = check_pictures(list_folder(root), 16, prompt="a", progress=False)
assert [e.path.name for e in checked.examples] == [p.name for p in sorted(root.iterdir())]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 450_000  # KiB
