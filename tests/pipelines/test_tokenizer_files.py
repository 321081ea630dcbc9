"""Tokenizers of strangers: what cannot run away is read, the rest is one line at load."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CAPTIONS, clip_tokenizer, t5_tokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from latentdiff.errors import UserError
from latentdiff.formats.tokenizer_files import load_tokenizer
from latentdiff.models.text_encoders import _check_tokenizer, encode_tokens

Change = dict[str, Any]
DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
TWICE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


def several(kind: str, parts: list[Any]) -> Change:
    return {"type": "Sequence", kind: parts}


def split(regex: str) -> Change:
    pattern = {"Regex": regex}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def charsmap(told: bytes) -> Change:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(told).decode()}


def written(folder: Path, kind: str, change: Callable[[Any], object]) -> Path:
    """The tiny tokenizer with a changed `tokenizer.json`, to be opened as a class."""
    clip_tokenizer().save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    change(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": kind}))
    return folder


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"normalizer": several("normalizers", [DOUBLE] * 9)}, "too long"),
        ({"normalizer": several("normalizers", [several("normalizers", [DOUBLE] * 5)] * 2)},
         "too long"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 300}}, "too long"),
        ({"normalizer": charsmap(b"\4\0\0\0" + b"...." + b"a" * 300 + b"\0")}, "too long"),
        ({"normalizer": charsmap(b"\0\0\0")}, "cut short"),
        ({"normalizer": charsmap(b"\4\0\0\0" + b"\xff" * 9)}, "no usable tokenizer"),
        ({"normalizer": several("normalizers", [{"type": "NFC"}] * 40)}, "too long|none that work"),
        ({"normalizer": {"type": "Unheard"}}, "Unheard"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength"),
        ({"pre_tokenizer": split("(a+)+$")}, "ages"),
        ({"pre_tokenizer": split(r"\s*\S*\s*$")}, "ages"),
        ({"pre_tokenizer": split("a?" * 25 + "a" * 25)}, "ages"),
        ({"pre_tokenizer": split("a+b")}, "ages"),
        ({"pre_tokenizer": split("a{99999,}")}, "ages"),
        ({"pre_tokenizer": split("a{9}{9}")}, "ages"),
        ({"pre_tokenizer": split(r"a\g<0>?")}, "ages"),
        ({"pre_tokenizer": split("a|" * 200 + "b")}, "ages"),
        ({"pre_tokenizer": split("[a[b]]+c")}, "ages"),
        ({"pre_tokenizer": split("")}, "ages"),
        ({"pre_tokenizer": split("[")}, "ages"),
        ({"post_processor": TWICE}, "repeats the text"),
        ({"post_processor": several("processors", [TWICE] * 20)}, "repeats the text"),
        ({"post_processor": {"type": "RobertaProcessing", "sep": ["x", 600], "cls": ["y", 601],
                             "trim_offsets": True, "add_prefix_space": False}}, "601"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}},
         "cannot read|no pad|usable"),
        ({"model": {"type": "Unheard"}}, "Unheard"),
        ({"model": 3}, "no usable tokenizer"),
        ({"normalizer": [1]}, "none that work"),
        ({"added_tokens": 3}, "no usable tokenizer"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_can_run_away_is_one_line(
    changes: Change, told: str, tmp_path: Path
) -> None:
    written(tmp_path, "PreTrainedTokenizerFast", lambda whole: whole.update(changes))
    with pytest.raises(UserError, match=told) as caught:
        _check_tokenizer(load_tokenizer(tmp_path, "CLIPTokenizer"), 560)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                        "strip_accents": None, "lowercase": True}),
        ("pre_tokenizer", {"type": "BertPreTokenizer"}),
        ("normalizer", several("normalizers", [{"type": "NFKC"}, {"type": "Lowercase"}])),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}),
        ("pre_tokenizer", split(r" ?\p{L}+| ?[\p{N}]{1,3}| ?[^\s\p{L}\p{N}]+?|\s+|it\?")),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                           "split": True}),
        ("post_processor", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                            "use_regex": True}),
    ],
)  # fmt: skip
def test_parts_of_sound_tokenizers_are_read(part: str, value: Change, tmp_path: Path) -> None:
    written(tmp_path, "PreTrainedTokenizerFast", lambda whole: whole.update({part: value}))
    _check_tokenizer(load_tokenizer(tmp_path, "CLIPTokenizer"), 560)


def test_what_transformers_writes_is_read_the_same(tmp_path: Path) -> None:
    """CLIP's own pattern and T5's pipeline, by transformers' class without a name for it."""
    for kind, tokenizer in (
        ("PreTrainedTokenizerFast", clip_tokenizer()),
        ("T5Tokenizer", t5_tokenizer()),
    ):
        tokenizer.save_pretrained(tmp_path / kind)
        config = tmp_path / kind / "tokenizer_config.json"
        told = json.loads(config.read_text()) | {"tokenizer_class": kind}
        config.write_text(json.dumps(told))
        again = load_tokenizer(tmp_path / kind, "CLIPTokenizer")
        for caption in CAPTIONS:
            ids = tokenizer.backend_tokenizer.encode(caption).ids
            assert again.backend_tokenizer.encode(caption).ids == ids
        assert isinstance(again, T5Tokenizer) == (kind == "T5Tokenizer")


def test_a_seed_means_the_same_tokens_each_time(tmp_path: Path) -> None:
    """BPE dropout is for training."""

    def change(whole: Any) -> None:
        whole["model"]["dropout"] = 0.5

    sound = clip_tokenizer().backend_tokenizer.encode(" ".join(CAPTIONS)).ids
    tokenizer = load_tokenizer(
        written(tmp_path, "PreTrainedTokenizerFast", change), "CLIPTokenizer"
    )
    for _ in range(3):
        assert [token for token, _ in encode_tokens(tokenizer, " ".join(CAPTIONS))] == sound


def test_nothing_in_the_folder_is_waited_for(tmp_path: Path) -> None:
    """A pipe in place of any file that some tokenizer has; or a device, or an immense file."""
    clip_tokenizer().save_pretrained(tmp_path)
    clip_tokenizer().backend_tokenizer.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    load_tokenizer(tmp_path, "CLIPTokenizer")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
        path, aside = tmp_path / name, tmp_path.parent / "aside"
        there = path.exists()
        if there:
            path.rename(aside)
        for make, told in (
            (lambda path: os.mkfifo(path), "a pipe"),
            (lambda path: path.symlink_to("/dev/zero"), "a device"),
            (lambda path: (path.touch(), os.truncate(path, 2**30)), "larger than 64 MiB"),
        ):
            make(path)
            with pytest.raises(UserError, match=told) as caught:
                load_tokenizer(tmp_path, "CLIPTokenizer")
            assert str(caught.value).startswith(str(path))
            path.unlink()
        if there:
            aside.rename(path)
