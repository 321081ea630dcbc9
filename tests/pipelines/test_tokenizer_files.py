"""Tokenizers of strangers: what cannot run away is read, the rest is one line at load."""

import base64
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CAPTIONS, clip_tokenizer, t5_tokenizer
from transformers.models.t5.tokenization_t5 import T5Tokenizer

from latentdiff.errors import UserError
from latentdiff.formats.tokenizer_files import load_tokenizer
from latentdiff.models.t5_tokenizer import T5Tokenizer as OwnT5Tokenizer
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
        assert isinstance(again, OwnT5Tokenizer) == (kind == "T5Tokenizer")


def number(value: int) -> bytes:
    """A whole number of protocol buffers."""
    digits = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(digit | 128 for digit in digits[:-1]), digits[-1]])


def message(fields: list[tuple[int, int | float | bytes]]) -> bytes:
    """A message of protocol buffers, as SentencePiece writes its vocabularies."""
    parts: list[bytes] = []
    for field, value in fields:
        if isinstance(value, float):
            parts.append(number(field << 3 | 5) + struct.pack("<f", value))
        elif isinstance(value, int):
            parts.append(number(field << 3) + number(value))
        else:
            parts.append(number(field << 3 | 2) + number(len(value)) + value)
    return b"".join(parts)


def spiece(
    trainer: tuple[tuple[int, int], ...] = (), normalizer: tuple[tuple[int, int | bytes], ...] = ()
) -> bytes:
    """The vocabulary of the tests' T5 as a `spiece.model`, with these further fields."""
    whole = json.loads(t5_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    pieces = [(1, message([(1, p.encode()), (2, float(s)), (3, 1)])) for p, s in whole]
    trained = message([(3, 1), (4, len(pieces)), (10, 0.9995), *trainer])
    return message([*pieces, (2, trained), (3, message([(1, b"nmt"), *normalizer]))])


TEXTS = [*CAPTIONS, "", "  two\tpeople \n holding  hands ", "</s> é日本🎉 <extra_id_0>", "x" * 99]


@pytest.mark.parametrize("extra", [0, 3, 100])
def test_t5s_own_tokenizer_is_that_of_transformers(extra: int, tmp_path: Path) -> None:
    """Of `tokenizer.json`, and of the `spiece.model` that is all that many a folder has."""
    vocab = [tuple(pair) for pair in json.loads(spiece_json())["model"]["vocab"]]
    theirs = T5Tokenizer(vocab=vocab, extra_ids=extra, model_max_length=20)
    theirs.save_pretrained(tmp_path / "json")
    own = load_tokenizer(tmp_path / "json", "T5Tokenizer")
    assert isinstance(own, OwnT5Tokenizer)
    again = T5Tokenizer.from_pretrained(tmp_path / "json")
    assert own.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert (own.pad_token_id, own.model_max_length) == (again.pad_token_id, 20)
    back = own.in_transformers()
    assert back.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert back.model_max_length == 20
    packed = tmp_path / "spiece"
    packed.mkdir()
    (packed / "spiece.model").write_bytes(spiece())
    told: dict[str, Any] = {"extra_ids": extra, "legacy": True, "sp_model_kwargs": {}}
    told["added_tokens_decoder"] = {"1": {"content": "</s>", "lstrip": True}}
    (packed / "tokenizer_config.json").write_text(json.dumps(told))
    last = len(vocab) + extra - 1
    added = {"<extra_id_0>": last} if extra else {}
    (packed / "added_tokens.json").write_text(json.dumps(added))
    read = load_tokenizer(packed, "T5Tokenizer")
    assert isinstance(read, OwnT5Tokenizer)
    assert read.added_tokens_encoder.get("<extra_id_0>", last) == last  # as T5 was trained
    for text in TEXTS:
        ids = again.backend_tokenizer.encode(text).ids
        assert own.backend_tokenizer.encode(text).ids == ids
        if "extra_id" not in text:
            assert read.backend_tokenizer.encode(text).ids == ids


def spiece_json() -> str:
    return t5_tokenizer().backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "change",
    [
        {"pad_token": "<unk>"},
        {"extra_special_tokens": ["<cat>"]},
        {"something_new": 1},
        {"added_tokens_decoder": {"1": {"content": "</s>", "lstrip": True}}},
    ],
)
def test_what_is_not_plainly_t5_is_left_to_transformers(change: Change, tmp_path: Path) -> None:
    t5_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    assert isinstance(load_tokenizer(tmp_path, "T5Tokenizer"), OwnT5Tokenizer)
    path.write_text(json.dumps(config | change))
    assert isinstance(load_tokenizer(tmp_path, "T5Tokenizer"), T5Tokenizer)


@pytest.mark.parametrize(
    ("data", "config", "told"),
    [
        (spiece()[:-1], {}, "damaged or cut short"),
        (b"\xff" * 12, {}, "damaged or cut short"),
        (b"\x08\x01", {}, "of another message"),
        (message([(1, message([(1, b"\xff"), (2, 0.0)]))]), {}, "can't decode"),
        (message([(1, message([(1, b"<s>"), (2, 0.0)]))]), {}, "does not begin with <pad>"),
        (spiece(trainer=((3, 2),)), {}, "its model_type is 2, which is not T5's"),
        (spiece(trainer=((35, 1),)), {}, "its byte_fallback is 1"),
        (spiece(normalizer=((4, 0),)), {}, "its remove_extra_whitespaces is 0"),
        (spiece(normalizer=((2, b"\4\0\0\0...."),)), {}, "tokenizer"),
        (spiece(), {"eos_token": "<end>"}, "its eos_token does not load here"),
        (spiece(), {"extra_ids": 10**9}, "extra_ids is 1000000000"),
        (spiece(), {"sp_model_kwargs": {"alpha": 0.1}}, "its sp_model_kwargs does not load"),
        (spiece(), {"added_tokens_decoder": {"9": {"content": "</s>"}}}, "an id that is not T5's"),
    ],
)  # fmt: skip
def test_a_vocabulary_of_sentencepiece_that_is_not_t5s(
    data: bytes, config: Change, told: str, tmp_path: Path
) -> None:
    (tmp_path / "spiece.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load_tokenizer(tmp_path, "T5Tokenizer")
    assert "\n" not in str(caught.value)


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
