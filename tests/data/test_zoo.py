"""A zoo of picture folders and tars, as operating systems and other tools leave them.

Each is made here, and gives the right samples or one true line; what is left out is logged.
"""

import csv
import gzip
import io
import json
import logging
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from latentdiff.data.check import check_pictures
from latentdiff.data.folder import list_folder, read_folder
from latentdiff.errors import UserError

RED, BLUE = (254, 0, 0), (0, 0, 254)
BOM = b"\xef\xbb\xbf"
APPLE_DOUBLE = struct.pack(">II16xH", 0x00051607, 0x00020000, 2) + b"\xb0" * 60
ROWS = [
    {"file_name": "a.png", "text": "a red square"},
    {"file_name": "b.png", "text": "a blue square"},
]
BOTH = {("a red square", RED), ("a blue square", BLUE)}
Samples = set[tuple[str, tuple[int, int, int]]]


def png(colour: tuple[int, int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    Image.new("RGB", (32, 32), colour).save(buffer, kind, **lossless)
    return buffer.getvalue()


def put(root: Path, **files: bytes | str) -> None:
    """Files by their names, `__` for a slash."""
    for name, content in files.items():
        write(root / name.replace("__", "/"), content)


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def pair(root: Path, name: str, colour: tuple[int, int, int], caption: bytes | str) -> None:
    """A picture and its caption, `name` with both suffixes: `a.png a.txt`."""
    picture, text = name.split()
    write(root / picture, png(colour))
    write(root / text, caption)


def both(root: Path) -> None:
    pair(root, "a.png a.txt", RED, "a red square")
    pair(root, "b.png b.txt", BLUE, "a blue square")


def pictures(root: Path) -> None:
    write(root / "a.png", png(RED))
    write(root / "b.png", png(BLUE))


def jsonl(rows: list[dict[str, str]] = ROWS) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tar(path: Path, *members: tuple[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def samples(*keys: str) -> list[tuple[str, bytes | str]]:
    """WebDataset's members of the red and the blue square."""
    red, blue = keys or ("0", "1")
    return [
        *((f"{red}.txt", "a red square"), (f"{red}.png", png(RED))),
        *((f"{blue}.txt", "a blue square"), (f"{blue}.png", png(BLUE))),
    ]


def hub(path: Path, *, group: int = 1, **columns: list[object]) -> None:
    """A parquet file as the Hub holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": png(RED), "path": "a.png"}, {"bytes": png(BLUE), "path": None}]
    texts: list[object] = ["a red square", "a blue square"]
    table = pa.table({"image": image, "text": texts, **columns})
    pq.write_table(table, path, row_group_size=group)


def named(path: Path, paths: list[str], texts: list[str]) -> None:
    """A parquet file that names its pictures instead of holding them."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    image = pa.array([{"bytes": None, "path": one} for one in paths], kind)
    pq.write_table(pa.table({"image": image, "text": texts}), path)


# What other programs leave, and the right samples of it.


def imagefolder(root: Path) -> None:
    pictures(root)
    put(root, **{"metadata.jsonl": jsonl()})


def excel_csv(root: Path) -> None:
    pictures(root)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["file_name", "text"])
    writer.writeheader()
    writer.writerows(ROWS)
    put(root, **{"metadata.csv": BOM + text.getvalue().encode()})


def notepad_jsonl(root: Path) -> None:
    pictures(root)
    put(root, **{"metadata.jsonl": BOM + jsonl().replace("\n", "\r\n").encode()})


def powershell_jsonl(root: Path) -> None:
    pictures(root)
    put(root, **{"metadata.jsonl": jsonl().encode("utf-16")})


def metadata_parquet(root: Path) -> None:
    pictures(root)
    made = pa.array([2**62, 1], pa.timestamp("us"))  # the year 148,000
    pq.write_table(pa.Table.from_pylist(ROWS).append_column("made", made), root / METADATA)


def split_folders(root: Path) -> None:
    for split, name in (("train", "a"), ("test", "b")):
        row = next(row for row in ROWS if row["file_name"] == f"{name}.png")
        write(root / split / f"{name}.png", png(RED if name == "a" else BLUE))
        write(root / split / "metadata.jsonl", jsonl([row]))


def metadata_in_train(root: Path) -> None:
    imagefolder(root / "train")


def windows_paths(root: Path) -> None:
    pictures(root / "sub")
    rows = [{**row, "file_name": "sub\\" + row["file_name"]} for row in ROWS]
    put(root, **{"metadata.jsonl": jsonl(rows)})


def caption_column(root: Path) -> None:
    pictures(root)
    rows = [{"file_name": row["file_name"], "caption": row["text"]} for row in ROWS]
    put(root, **{"metadata.jsonl": jsonl(rows)})


def kohya(root: Path) -> None:
    """Repeats in the folder's name, latents cached beside the pictures."""
    both(root / "10_square")
    put(root / "10_square", **{"a.npz": b"PK", "b_0032x0032_sd.npz": b"PK"})


def kohya_captions(root: Path) -> None:
    pair(root, "a.png a.caption", RED, "a red square")
    pair(root, "b.png b.caption", BLUE, "a blue square\n")


def macos(root: Path) -> None:
    both(root)
    for name in ("._a.png", "._a.txt", "._b.png", ".DS_Store", "__MACOSX__._a.png"):
        put(root, **{name: APPLE_DOUBLE})
    write(root / "__MACOSX" / "._b.txt", APPLE_DOUBLE)
    write(root / "__MACOSX" / "c.png", png(RED))


def windows(root: Path) -> None:
    pair(root, "A.PNG A.TXT", RED, BOM + b"a red square\r\n")
    pair(root, "b.Png b.Txt", BLUE, "a blue square".encode("utf-16"))
    put(root, **{"Thumbs.db": b"\xd0\xcf", "desktop.ini": "[.ShellClassInfo]", "ehthumbs.db": b""})


def synology(root: Path) -> None:
    both(root)
    write(root / "@eaDir" / "a.png" / "SYNOPHOTO_THUMB_M.jpg", png(RED, "JPEG"))
    write(root / "#recycle" / "old.png", png(RED))


def notebook(root: Path) -> None:
    both(root)
    write(root / ".ipynb_checkpoints" / "a-checkpoint.png", png((0, 254, 0)))
    write(root / ".thumbnails" / "b.png", png((0, 254, 0)))
    write(root / ".Trash-1000" / "files" / "c.png", png((0, 254, 0)))


def git_clone(root: Path) -> None:
    both(root)
    put(root, **{".gitattributes": "*.png filter=lfs", "README.md": "# Squares", "LICENSE": "CC0"})
    write(root / ".git" / "HEAD", "ref: refs/heads/main")
    write(root / "README.txt", "Squares.")


def rsync(root: Path) -> None:
    both(root)
    put(root, **{".c.png.Xy12Zz": b"\x89PNG half"})


def other_endings(root: Path) -> None:
    for number, (name, kind) in enumerate(
        (("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c.bmp", "BMP"))
    ):
        write(root / name, png((80 * number, 0, 0), kind))
        write(root / f"{name[0]}.txt", name)
    write(root / "d.avif", png(BLUE, "AVIF"))
    write(root / "d.txt", "d.avif")


def lightroom(root: Path) -> None:
    both(root)
    put(root, **{"a.xmp": "<x:xmpmeta/>", "Lightroom Catalog.lrcat": b"SQLite"})


def latin_names(root: Path) -> None:
    """A zip of an old Windows, whose names are no UTF-8."""
    pair(root, f"{os.fsdecode(b'caf' + bytes([0xE9]))}.png b.txt", RED, "a blue square")
    write(root / f"{os.fsdecode(b'caf' + bytes([0xE9]))}.txt", "a red square")
    write(root / "b.png", png(BLUE))


def hub_clone(root: Path) -> None:
    hub(root / "data" / "train-00000-of-00001.parquet")
    put(root, **{"README.md": "---\nlicense: cc0-1.0\n---", ".gitattributes": "*.parquet"})
    write(root / "assets" / "cover.png", png(RED))


def hub_parts(root: Path) -> None:
    for number, (text, colour) in enumerate(sorted(BOTH)):
        table = pa.table({"image": [{"bytes": png(colour), "path": "x.png"}], "text": [text]})
        pq.write_table(table, root / f"train-0000{number}-of-00002.parquet")


def parquet_file(root: Path) -> Path:
    days = pa.array([10**8, 1], pa.date32())
    hub(root / "squares.parquet", group=2, mask=[b"1", b"2"], day=days, keys=[["a"], None])
    return root / "squares.parquet"


def parquet_metadata(root: Path) -> None:
    hub(root / METADATA)


def parquet_of_bytes(root: Path) -> Path:
    table = pa.table({"image": [png(RED), png(BLUE)], "caption": ["a red square", "a blue square"]})
    pq.write_table(table, root / "x.parquet")
    return root / "*.parquet"


def parquet_of_paths(root: Path) -> None:
    """`load_dataset("imagefolder").to_parquet(...)` of datasets 5.2: the pictures' paths alone."""
    imagefolder(root / "imgs")
    (root / "imgs/metadata.jsonl").unlink()
    paths = [str(root / "imgs" / row["file_name"]) for row in ROWS]
    named(root / "x.parquet", paths, [row["text"] for row in ROWS])


def shards(root: Path) -> Path:
    first, second = samples()[:2], samples()[2:]
    tar(root / "00000.tar", *first)
    tar(root / "00001.tar", *second)
    return root / "{00000..00001}.tar"


def shard_folder(root: Path) -> None:
    shards(root)
    put(
        root, **{"README.md": "# Squares", "index.json": '{"shardlist": []}', "cover.png": png(RED)}
    )


def shard_glob(root: Path) -> Path:
    shards(root)
    put(root, **{"._00000.tar": APPLE_DOUBLE})
    return root / "*.tar"


def img2dataset(root: Path) -> None:
    """Captions in the JSON, tables and statistics beside the shards."""
    members: list[tuple[str, bytes | str]] = []
    for key, (text, colour) in enumerate(sorted(BOTH)):
        about = {"caption": text, "url": "https://a.b", "key": f"{key:09}", "status": "success"}
        members += [(f"{key:09}.jpg", png(colour)), (f"{key:09}.json", json.dumps(about))]
    tar(root / "00000.tar", *members)
    table = pa.table({"url": ["https://a.b"], "caption": ["a red square"], "status": ["success"]})
    pq.write_table(table, root / "00000.parquet")
    put(root, **{"00000_stats.json": '{"count": 2}'})


def mac_tar(root: Path) -> Path:
    droppings = [("._0.png", APPLE_DOUBLE), ("._0.txt", APPLE_DOUBLE), (".DS_Store", b"\0\0\0\1")]
    tar(root / "x.tar", *droppings, ("__MACOSX/0.txt", APPLE_DOUBLE), *samples())
    return root / "x.tar"


def tar_of_a_folder(root: Path) -> Path:
    """`tar cf x.tar .`: in the order of the disk, all pictures before all captions."""
    members = [(f"./sub.d/{name}", data) for name, data in samples("a", "b")]
    members.sort(key=lambda member: member[0].endswith(".txt"))
    notes = [("./README.md", "# Squares"), ("./README.txt", "Squares"), ("./LICENSE", "CC0")]
    tar(root / "x.tar", *notes, *members)
    return root / "x.tar"


def tar_with_boms(root: Path) -> Path:
    about = BOM + json.dumps({"text": "a red square"}).encode()
    tar(root / "x.tar", ("0.png", png(RED)), ("0.json", about), *samples()[2:])
    return root / "x.tar"


METADATA = "metadata.parquet"
GOOD: dict[str, tuple[Callable[[Path], Path | None], str]] = {
    "imagefolder": (imagefolder, ""),
    "a CSV of Excel": (excel_csv, ""),
    "a JSONL of Notepad": (notepad_jsonl, ""),
    "a JSONL of PowerShell": (powershell_jsonl, ""),
    "parquet metadata, a date beyond all calendars": (metadata_parquet, ""),
    "train and test, each with metadata": (split_folders, "has the splits test, train"),
    "metadata in train": (metadata_in_train, ""),
    "paths of Windows": (windows_paths, ""),
    "a column caption": (caption_column, ""),
    "kohya": (kohya, ""),
    "kohya, .caption": (kohya_captions, ""),
    "macOS": (macos, ""),
    "Windows": (windows, ""),
    "Synology": (synology, ""),
    "a notebook and a file manager": (notebook, ""),
    "a clone of git": (git_clone, ""),
    "rsync, stopped": (rsync, ""),
    "sidecars of Lightroom": (lightroom, ""),
    "names in Latin-1": (latin_names, ""),
    "a clone of the Hub": (hub_clone, "cover.png"),
    "parquet in parts": (hub_parts, ""),
    "a parquet file": (parquet_file, ""),
    "parquet metadata with pictures": (parquet_metadata, ""),
    "parquet of bytes, by a pattern": (parquet_of_bytes, ""),
    "parquet of paths": (parquet_of_paths, ""),
    "shards": (shards, ""),
    "a folder of shards": (shard_folder, "cover.png"),
    "shards by *": (shard_glob, ""),
    "img2dataset": (img2dataset, ""),
    "a tar of macOS": (mac_tar, ""),
    "a tar of a folder": (tar_of_a_folder, ""),
    "a tar of BOMs": (tar_with_boms, ""),
}


def found(root: Path) -> Samples:
    result: Samples = set()
    for example in read_folder(root):
        red, _, blue = example.open().getpixel((3, 3))  # pyright: ignore[reportGeneralTypeIssues]
        (caption,) = example.captions
        result.add((caption, RED if red > blue else BLUE))
    return result


@pytest.mark.parametrize("name", GOOD)
def test_the_right_samples_and_no_others(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, told = GOOD[name]
    with caplog.at_level(logging.WARNING):
        root = build(tmp_path) or tmp_path
        assert found(root) == BOTH
        assert len(read_folder(root)) == 2
    if not told:
        assert not caplog.text
    assert all(word in caplog.text for word in told.split("|"))


def test_every_ending_of_a_picture_is_read(tmp_path: Path) -> None:
    other_endings(tmp_path)
    examples = read_folder(tmp_path)
    assert [example.captions for example in examples] == [
        ("a.jfif",),
        ("b.jpe",),
        ("c.bmp",),
        ("d.avif",),
    ]
    assert len(check_pictures(examples, 32, progress=False).examples) == 4


def test_splits_are_a_field_of_their_own(tmp_path: Path) -> None:
    split_folders(tmp_path)
    (example,) = read_folder(tmp_path, where={"split": ("train",)})
    assert example.captions == ("a red square",)


# What cannot be read, and the one true line.


def heic(root: Path) -> None:
    both(root)
    pair(root, "c.heic c.txt", RED, "c")
    pair(root, "d.tiff d.txt", RED, "d")


def orphans(root: Path) -> None:
    both(root)
    put(root, **{"c.txt": "a green square", "README.txt": "Squares"})


def two_captions(root: Path) -> None:
    both(root)
    put(root, **{"a.caption": "a square"})


def unlisted(root: Path) -> None:
    imagefolder(root)
    pair(root, "c.png c.txt", RED, "a third")


def shards_too(root: Path) -> None:
    both(root)
    tar(root / "backup.tar", *samples())


def backup_tar(root: Path) -> None:
    """No captions, for --instance-prompt; the tar is a copy."""
    pictures(root)
    tar(root / "backup.tar", ("a.png", png(RED)), ("b.png", png(BLUE)))


def broken_backup(root: Path) -> None:
    pictures(root)
    put(root, **{"backup.tar": "no tar", "results.parquet": "no parquet"})


def linked_folder(root: Path) -> None:
    both(root)
    (root / "more").symlink_to(root.parent)


LEFT_OUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "other kinds": (
        heic,
        "{}: left out, as no PNG, JPEG, WebP, BMP or AVIF pictures; convert them: c.heic, d.tiff",
    ),
    "captions alone": (orphans, "{}: captions without a picture: c.txt"),
    "two captions": (two_captions, "left out, as the .txt of the same name is read: a.caption"),
    "unlisted": (
        unlisted,
        "left out, as no metadata lists them, though captions lie beside them: c.png",
    ),
    "shards beside pictures": (shards_too, "captioned pictures beside them are read: backup.tar"),
    "a packed copy": (backup_tar, "pictures beside them are read: backup.tar"),
    "a broken copy": (broken_backup, "backup.tar cannot be read"),
    "a link to a folder": (linked_folder, "more is a link to a folder, and not followed"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_told(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build, told = LEFT_OUT[name]
    build(tmp_path)
    with caplog.at_level(logging.WARNING):
        examples = list_folder(tmp_path)
    assert [example.path.name for example in examples] == ["a.png", "b.png"]
    assert told.format(tmp_path) in caplog.text
    assert len(caplog.records) == 1


def semicolons(root: Path) -> None:
    pictures(root)
    put(root, **{"metadata.csv": "file_name;text\na.png;a red square\n"})


def hub_names(root: Path) -> None:
    pictures(root)
    rows = [{"image": row["file_name"], "prompt": row["text"]} for row in ROWS]
    put(root, **{"metadata.jsonl": jsonl(rows)})


def two_metadata(root: Path) -> None:
    imagefolder(root / "train")
    put(root, train__metadata_csv="")
    (root / "train/metadata_csv").rename(root / "train/metadata.csv")


def half_caption(root: Path) -> None:
    pictures(root)
    put(root, **{"metadata.jsonl": jsonl().replace("a red", "\\ud83d")})


def latin_caption(root: Path) -> None:
    both(root)
    put(root, **{"a.txt": "café".encode("latin-1")})


def no_pictures(root: Path) -> None:
    write(root / ".thumbnails" / "a.png", png(RED))


def gzipped(root: Path) -> Path:
    shards(root)
    (root / "x.tar").write_bytes(gzip.compress((root / "00000.tar").read_bytes()))
    return root / "x.tar"


def zipped(root: Path) -> Path:
    with zipfile.ZipFile(root / "x.zip", "w") as file:
        file.writestr("a.png", png(RED))
    return root / "x.zip"


def packed_imagefolder(root: Path) -> Path:
    members: list[tuple[str, bytes | str]] = [("a.png", png(RED)), ("metadata.jsonl", jsonl())]
    tar(root / "x.tar", *members)
    return root / "x.tar"


def table_alone(root: Path) -> None:
    pq.write_table(pa.table({"url": ["https://a.b"], "caption": ["a"]}), root / "x.parquet")


def paths_outside(root: Path) -> None:
    secret = root.parent / f"{root.name}-secret.png"
    secret.write_bytes(png(RED))
    named(root / "x.parquet", [str(secret)], ["a"])


def shard_outside(root: Path) -> None:
    tar(root.parent / f"{root.name}-secret.tar", *samples())
    (root / "x.tar").symlink_to(root.parent / f"{root.name}-secret.tar")


def dotted(root: Path) -> Path:
    tar(root / "x.tar", ("my.photo.png", png(RED)), ("my.photo.txt", "a"), ("my.json", "{}"))
    return root / "x.tar"


BAD: dict[str, tuple[Callable[[Path], Path | None], str]] = {
    "semicolons": (semicolons, r"no file_name, .* but file_name;text; separate .* by commas"),
    "other columns": (hub_names, r"no file_name, .* but image, prompt"),
    "two metadata": (two_metadata, "train has both metadata.jsonl and metadata.csv: keep one"),
    "half a character": (half_caption, r"a caption of a.png has half a character \(U\+D83D\)"),
    "Latin-1": (latin_caption, "a.txt cannot be read: 'utf-8' codec"),
    "hidden alone": (no_pictures, r"holds no pictures .*; .thumbnails and its like are left out"),
    "gzip": (gzipped, r"x.tar cannot be read: it is compressed \(gzip\): unpack it"),
    "zip": (zipped, "x.zip is packed: unpack it into a folder"),
    "a packed imagefolder": (
        packed_imagefolder,
        "a picture folder with its metadata.jsonl: unpack",
    ),
    "a table alone": (table_alone, "has no column image that holds pictures .* but url, caption"),
    "paths outside": (paths_outside, "names its pictures .* lie outside of"),
    "a shard outside": (shard_outside, "x.tar lies outside the folder"),
    "dots in a shard": (dotted, "the sample 'my' has no picture .* but photo.png, photo.txt, json"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_true_line(name: str, tmp_path: Path) -> None:
    build, message = BAD[name]
    root = build(tmp_path) or tmp_path
    with pytest.raises(UserError, match=message) as caught:
        read_folder(root)
    assert "\n" not in str(caught.value)


def test_words_that_cannot_be_read_are_skipped_where_that_is_asked(tmp_path: Path) -> None:
    """By `--bad skip`: all but the faulty are left; a prompt for all needs no captions."""
    both(tmp_path)
    put(tmp_path, **{"a.txt": "café".encode("latin-1")})
    checked = check_pictures(list_folder(tmp_path), 1, progress=False)
    assert [example.path.name for example in checked.examples] == ["b.png"]
    assert checked.must_mend
    assert checked.summary() == "1 of 2 pictures (1 garbled)"
    assert "a.txt cannot be read" in checked.faults[0].line
    assert len(check_pictures(list_folder(tmp_path), 1, prompt="a", progress=False).examples) == 2
    tar(tmp_path / "x.tar", ("0.png", png(RED)), ("0.json", '{"text": "\\ud83d"}'), *samples()[2:])
    checked = check_pictures(list_folder(tmp_path / "x.tar"), 1, progress=False)
    assert checked.summary() == "1 of 2 pictures (1 garbled)"


def test_the_same_picture_twice_is_learned_once_with_all_its_names(tmp_path: Path) -> None:
    """As the Noto emoji has it: six of its pictures have two names each."""
    pair(tmp_path, "a.png a.txt", RED, "a person")
    pair(tmp_path, "b.png b.txt", RED, "an adult")
    pair(tmp_path, "c.png c.txt", BLUE, "a sea")
    checked = check_pictures(list_folder(tmp_path), 1, progress=False)
    assert [example.captions for example in checked.examples] == [
        ("a person", "an adult"),
        ("a sea",),
    ]
    assert [fault.trouble for fault in checked.faults] == ["duplicate"]
    assert not checked.must_mend
