"""Files that nobody vouches for: what may be read, what text is, what a terminal is shown."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.errors import LONGEST, UserError, shown
from latentdiff.formats.weights import WeightFiles, read_json
from latentdiff.learning.finetune_config import resolve
from latentdiff.reading import (
    MOST_NESTED,
    decode,
    half_character,
    open_regular,
    parse_json,
    read_bytes,
    read_text,
)

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufeff")))
def test_text_is_the_same_in_every_encoding_that_programs_save(text: str) -> None:
    for encoding in ENCODINGS:
        assert decode(text.encode(encoding)) == text
    assert half_character(text) is None


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_byte_order_mark_is_no_part_of_a_text(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes('{"a": 1}'.encode(encoding))
    assert read_json(tmp_path / "config.json") == {"a": 1}
    (tmp_path / "prior.txt").write_bytes("a dog\r\n\r\na cat\r\n".encode(encoding))
    values = {
        "method": "lora",
        "out": str(tmp_path / "out"),
        "data": {"root": str(tmp_path / "pictures")},
        "prior": {"prompts": [f"@{tmp_path}/prior.txt"]},
    }
    assert resolve(values, "test").prior.prompts == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "out"), [("shards/*.tar", "runs/shards-lora"), ("a.parquet", "runs/a.parquet-lora")]
)
def test_a_run_on_several_files_is_named_by_their_folder(name: str, out: str) -> None:
    assert resolve({"data": {"root": name}}, "test").out == Path(out)


@pytest.mark.parametrize("text", ["\ud83d", "a \ude00", "caf\udce9", "\ud83d\u0020\ude00"])
def test_half_a_character_is_found(text: str) -> None:
    found = half_character(text)
    assert found is not None
    assert found.startswith("U+D")


def test_json_is_no_deeper_than_what_looks_into_it() -> None:
    for text in ("1", "[]", '{"a": [1, {"b": null}]}', "[" * MOST_NESTED + "]" * MOST_NESTED):
        assert parse_json(text) == json.loads(text)
    for depth in (MOST_NESTED + 1, 500, 10**5):
        for start, end in (("[", "]"), ('{"a": ', "}"), ('[1, {"a": 2, "b": ', "}]")):
            with pytest.raises(ValueError, match="nested too deep"):
                parse_json(start * depth + "1" + end * depth)


def test_only_regular_files_are_read_and_no_more_than_agreed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert read_bytes(path, 100) == bytes(100)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for other, told in (
        (path, "larger than 99 bytes"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "zero", "not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "lost", "No such file"),
        (Path("a\0b"), "no file can have this name"),
        (Path("\ud83d"), "no file can have this name"),
    ):
        with pytest.raises(OSError, match=told):
            read_text(other, 99)
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_config_or_weights_of_no_regular_file_are_refused(kind: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"config\.json: not a regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"model\.safetensors: not a regular file"):
        WeightFiles([tmp_path / "model.safetensors"])


def test_a_message_is_bounded_and_a_terminal_obeys_nothing_in_it(tmp_path: Path) -> None:
    name = "\x1b[2J\x1b]0;owned\x07" + "a" * 10**6
    header = f'{{"{name}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}'
    data = header.replace("\x1b", "\\u001b").replace("\x07", "\\u0007").encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + bytes(4))
    files = WeightFiles([path])
    with pytest.raises(UserError) as caught:
        raise UserError(f"{path}: tensor {next(iter(files.shapes))} is nowhere")
    told = str(caught.value)
    assert told.startswith(f"{path}: tensor \\x1b[2J\\x1b]0;owned\\x07aaa")
    assert told.endswith("aaa is nowhere")
    assert len(told) < 1.1 * LONGEST


@given(st.text(), st.integers(4, 99))
def test_what_is_shown_is_one_line_that_a_terminal_shows(text: str, most: int) -> None:
    line = shown(text, most)
    line.encode()
    assert not [c for c in line if ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u202e"]
    if len(text) <= most and text.isascii() and text.isprintable():
        assert line == text


def test_emoji_are_shown_as_they_are() -> None:
    for text in ("👩‍🚒 ❤️", "café", "日本", "שלום"):
        assert shown(text) == str(UserError(text)) == text
