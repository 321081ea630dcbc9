"""Folders of pictures with captions: every layout, every mistake, the weights of sampling."""

import csv
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentdiff.data.examples import Example, balanced_weights, load_picture, load_pictures
from latentdiff.data.folder import read_folder
from latentdiff.errors import UserError

Row = dict[str, object]

ROWS: list[Row] = [
    {"file_name": "a.png", "text": "a cat", "captions": ["a cat", " cat ", ""], "style": "noto"},
    {"file_name": "sub/b.webp", "text": "a dog", "captions": None, "style": "flat"},
    {"file_name": "c.jpg", "text": "", "captions": ["an ant", "a bug"], "style": ""},
]
CAPTIONS = [("a cat", "cat"), ("a dog",), ("an ant", "a bug")]


def draw(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (40 * number, 100, 200)).save(path)


def write_jsonl(root: Path, rows: list[Row]) -> None:
    lines = "\n\n".join(json.dumps(row) for row in rows)
    (root / "metadata.jsonl").write_text(lines + "\n", "utf-8")


def write_csv(root: Path, rows: list[Row]) -> None:
    with (root / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            more = row["captions"]
            writer.writerow(row | {"captions": json.dumps(more) if more else ""})


def write_parquet(root: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), root / "metadata.parquet")


def write_texts(root: Path, rows: list[Row]) -> None:
    for row, captions in zip(rows, CAPTIONS, strict=True):
        text = "\n".join(captions) + "\n"
        (root / str(row["file_name"])).with_suffix(".txt").write_text(text, "utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    draw(tmp_path, *(str(row["file_name"]) for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet, write_texts])
def test_every_layout_gives_the_same_examples(
    root: Path, write: Callable[[Path, list[Row]], None]
) -> None:
    write(root, ROWS)
    examples = read_folder(root)
    assert {example.path: example.captions for example in examples} == {
        root / str(row["file_name"]): captions for row, captions in zip(ROWS, CAPTIONS, strict=True)
    }
    if write is not write_texts:
        assert [example.path.name for example in examples] == ["a.png", "b.webp", "c.jpg"]
        assert [example.fields["style"] for example in examples] == ["noto", "flat", ""]


def test_where_keeps_what_it_names(root: Path) -> None:
    extra = [{"toned": True}, {"toned": None}, {}]
    write_jsonl(root, [row | more for row, more in zip(ROWS, extra, strict=True)])

    def names(**where: tuple[str, ...]) -> list[str]:
        return [example.path.name for example in read_folder(root, where=where)]

    assert names(style=("noto", "flat")) == ["a.png", "b.webp"]
    assert names(style=("",)) == ["c.jpg"]
    assert names(toned=("true",)) == ["a.png"]
    assert names(toned=("",)) == ["b.webp", "c.jpg"]
    assert names(style=("flat", ""), toned=("",)) == ["b.webp", "c.jpg"]
    with pytest.raises(UserError, match=r"no picture .* has the field 'stlye'"):
        names(stlye=("noto",))
    with pytest.raises(UserError, match=r"has style in \('nto',\); there are 'noto', 'flat', ''"):
        names(style=("nto",))


def _two_metadata(root: Path) -> None:
    write_jsonl(root, ROWS)
    write_csv(root, ROWS)


def _outside_by_link(root: Path) -> None:
    outside = root.parent / f"{root.name}-secret.png"
    Image.new("RGB", (2, 2)).save(outside)
    (root / "link.png").symlink_to(outside)
    write_jsonl(root, [{"file_name": "link.png", "text": "x"}])


def _directory(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).mkdir()


def _linked(name: str, to: str | None = None) -> Callable[[Path], None]:
    """A file of the folder that is a link to `to`, or to somebody's secret, which parses."""

    def spoil(root: Path) -> None:
        outside = root.parent / f"{root.name}-secret"
        outside.write_text('{"file_name": "a.png", "text": "secret"}')
        (root / name).symlink_to(to or outside)

    return spoil


def _latin(name: str) -> Callable[[Path], object]:
    text = '{"file_name": "a.png", "text": "café"}'
    return lambda root: (root / name).write_bytes(text.encode("latin-1"))


def _rows(*rows: Row) -> Callable[[Path], None]:
    return lambda root: write_jsonl(root, list(rows))


def _text(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


A: Row = {"file_name": "a.png", "text": "a cat"}
LOST: list[Row] = [{"file_name": f"lost{i}.png", "text": "x"} for i in range(5)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_two_metadata, "both metadata.jsonl and metadata.csv"),
        (_rows(A, *LOST), r"5 pictures .* are missing: lost0.png, lost1.png, lost2.png, \.\.\."),
        (_rows(A, A), "1 pictures .* are listed more than once: a.png"),
        (_rows(A | {"file_name": "../a.png"}), "lie outside the folder: ../a.png"),
        (_rows(A | {"file_name": "/etc/passwd"}), "lie outside the folder: /etc/passwd"),
        (_outside_by_link, "lie outside the folder: link.png"),
        (_linked("metadata.jsonl"), "metadata.jsonl lies outside the folder"),
        (_linked("a.txt"), "a.txt lies outside the folder"),
        (_rows({"file_name": "a.png", "text": " "}), "1 pictures .* have no caption: a.png"),
        (_rows({"text": "no name"}), "no file_name"),
        (_rows(A | {"file_name": "a\0.png"}), "no file_name"),
        (_rows(A | {"file_name": None}, A | {"file_name": None}), "a row .* has no file_name"),
        (_text("metadata.csv", "file_name,text\n,a\n,b\n"), "a row .* has no file_name"),
        (_rows(A | {"text": 7}), "the text of a.png is not a string"),
        (_rows(A | {"captions": "a cat"}), "the captions of a.png are not a list"),
        (_rows(A | {"captions": [1]}), "the captions of a.png are not a list"),
        (_text("metadata.jsonl", '{"file_name": \n'), "line 1: not JSON"),
        (_text("metadata.jsonl", "[1]\n"), "line 1: not a JSON object"),
        (_text("metadata.jsonl", '{"n": ' + "7" * 5000 + "}"), "line 1: not JSON"),
        (_text("metadata.jsonl", "[" * 200_000), r"line 1: not JSON \(it is nested too deep"),
        (_text("metadata.jsonl", ""), "holds no pictures"),
        (_text("metadata.csv", "file_name,text\na.png,x,y\n"), "more cells than the header"),
        (_text("metadata.csv", "file_name,captions\na.png,[x\n"), "must be a JSON list"),
        (_text("metadata.csv", 'file_name,text\na.png,"x"y\n'), "metadata.csv cannot be read"),
        (_latin("metadata.jsonl"), "metadata.jsonl cannot be read: 'utf-8' codec"),
        (_text("metadata.parquet", "PAR1 no"), "metadata.parquet cannot be read"),
        (_directory("metadata.parquet"), "metadata.parquet cannot be read: Is a directory"),
        (_linked("metadata.csv", "lost"), "metadata.csv cannot be read: No such file"),
        (_directory("a.txt"), "a.txt cannot be read: Is a directory"),
        (_latin("a.txt"), "a.txt cannot be read: 'utf-8' codec"),
        (_text("a.txt", "a cat"), "2 pictures .* have no caption: c.jpg, sub/b.webp"),
    ],
)
def test_a_mistake_is_one_clear_line(
    root: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(root)
    with pytest.raises(UserError, match=message) as caught:
        read_folder(root)
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no picture folder"):
        read_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no pictures"):
        read_folder(tmp_path)


def test_pictures_are_loaded_in_order(root: Path) -> None:
    write_jsonl(root, ROWS)
    examples = read_folder(root)
    pictures = load_pictures(examples, 8, progress=False)
    assert pictures.shape == (3, 3, 8, 8)
    assert pictures.dtype == torch.uint8
    for picture, example in zip(pictures, examples, strict=True):
        assert torch.equal(picture, load_picture(example, 8))
    assert (pictures[:, 0].float().mean((1, 2)) - torch.tensor([0.0, 40.0, 80.0])).abs().max() < 4


def test_every_broken_picture_is_counted(root: Path) -> None:
    write_jsonl(root, ROWS)
    (root / "a.png").write_bytes(b"<html>")
    (root / "c.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 3 pictures cannot be used; the first: .*a\.png"):
        load_pictures(read_folder(root), 8, progress=False)


styles_and_bases = st.lists(
    st.tuples(st.sampled_from(["noto", "flat"]), st.integers(0, 4)), min_size=1, max_size=40
)


@given(styles_and_bases)
def test_every_group_is_drawn_equally(pairs: list[tuple[str, int]]) -> None:
    examples = [Example(Path(), ("x",), {"style": style, "base": base}) for style, base in pairs]
    weights = balanced_weights(examples)
    totals: dict[tuple[str, int], float] = defaultdict(float)
    for pair, weight in zip(pairs, weights, strict=True):
        totals[pair] += weight
        assert weight == pytest.approx(1 / len(set(pairs)) / pairs.count(pair))
    np.testing.assert_allclose(list(totals.values()), 1 / len(totals))
    assert weights.dtype == np.float64


def test_without_the_fields_all_are_drawn_equally() -> None:
    examples = [Example(Path(), ("x",), {"style": "noto"}) for _ in range(7)]
    np.testing.assert_allclose(balanced_weights(examples), 1 / 7)
    np.testing.assert_allclose(balanced_weights(examples, ("style",)), 1 / 7)
