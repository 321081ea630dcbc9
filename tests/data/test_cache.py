"""Cached latents: read again when they are right, made again when they are not."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.data import cache
from latentdiff.data.cache import LatentCache, TextCache
from latentdiff.data.examples import Example, load_picture
from latentdiff.errors import UserError
from latentdiff.models.identity import weights_hash
from latentdiff.models.text_encoders import TextStates, Tokens


class Encoder:
    """Means of 4 x 4 patches; it keeps what it was asked for."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, pictures: Tensor) -> Tensor:
        self.seen += len(pictures)
        return nn.functional.avg_pool2d(pictures.float(), 4)


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    for number in range(7):
        colour = (30 * number, 255 - number, 7)
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{number}.png")
    return [Example(tmp_path / f"{number}.png", ("x",), {}) for number in range(7)]


def get(store: LatentCache, examples: list[Example], encoder: Encoder) -> Tensor:
    return store.latents(
        examples, lambda one: load_picture(one, 8), encoder, batch_size=2, progress=False
    )


def test_latents_are_encoded_once_and_read_in_any_order(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD", 3)
    store, encoder = LatentCache(tmp_path / "cache", "w", "8 px"), Encoder()
    some = get(store, examples[:4], encoder)
    assert some.shape == (4, 3, 2, 2)
    assert encoder.seen == 4
    every = get(store, examples, encoder)
    assert encoder.seen == 7
    expected = torch.tensor([[30.0 * i, 255 - i, 7] for i in range(7)])
    assert torch.equal(every, expected[:, :, None, None].expand(7, 3, 2, 2))
    order = [6, 0, 3, 3]
    assert torch.equal(get(store, [examples[i] for i in order], encoder), every[order])
    assert encoder.seen == 7
    assert not list((tmp_path / "cache").rglob("*.part"))
    assert get(store, [], encoder).shape == (0,)


def test_other_weights_transforms_and_pictures_are_encoded_anew(
    tmp_path: Path, examples: list[Example]
) -> None:
    folder, encoder = tmp_path / "cache", Encoder()
    get(LatentCache(folder, "w", "8 px"), examples, encoder)
    get(LatentCache(folder, "v", "8 px"), examples, encoder)
    get(LatentCache(folder, "w", "8 px, flipped"), examples, encoder)
    assert encoder.seen == 21
    Image.new("RGB", (8, 8), "white").save(examples[2].path)
    latents = get(LatentCache(folder, "w", "8 px"), examples, encoder)
    assert encoder.seen == 22
    assert torch.equal(latents[2], torch.full((3, 2, 2), 255.0))


@pytest.mark.parametrize("damage", ["flipped bit", "cut", "other tensors", "empty"])
def test_a_damaged_shard_is_made_again(
    tmp_path: Path, examples: list[Example], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, encoder = LatentCache(tmp_path / "cache", "w", "8 px"), Encoder()
    whole = get(store, examples, encoder)
    (shard,) = (tmp_path / "cache").rglob("*.safetensors")
    data = shard.read_bytes()
    if damage == "other tensors":
        save_file({"x": torch.zeros(3)}, shard)
    else:
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        shard.write_bytes({"flipped bit": flipped, "cut": data[:99], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(get(store, examples, encoder), whole)
    assert "is damaged" in caplog.text
    assert encoder.seen == 14
    assert shard.read_bytes() == data
    get(store, examples, encoder)
    assert encoder.seen == 14


def test_what_was_encoded_before_a_stop_is_kept(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD", 2)
    store, encoder = LatentCache(tmp_path / "cache", "w", "8 px"), Encoder()
    examples[5].path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"5\.png is not a PNG"):
        get(store, examples, encoder)
    Image.new("RGB", (8, 8), "white").save(examples[5].path)
    get(store, examples, encoder)
    assert encoder.seen == 7


def test_files_that_cannot_be_read_or_written(tmp_path: Path, examples: list[Example]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        get(LatentCache(tmp_path / "file", "w", "t"), examples, Encoder())
    examples[0].path.unlink()
    with pytest.raises(UserError, match=r"cannot open picture .*0\.png"):
        get(LatentCache(tmp_path / "cache", "w", "t"), examples, Encoder())


def test_adding_one_picture_to_2000_encodes_one(tmp_path: Path) -> None:
    """And the captions likewise, for a tower that masks its padding and one that does not."""
    pixels = torch.arange(2001)[:, None] // torch.tensor([1, 45]) % 45 * 5
    for number in range(2001):
        colour = (int(pixels[number, 0]), int(pixels[number, 1]), number // 2000)
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{number}.png", compress_level=0)
    examples = [Example(tmp_path / f"{number}.png", ("x",), {}) for number in range(2001)]
    store, encoder = LatentCache(tmp_path / "cache", "w", "4 px"), Encoder()

    def get_all(count: int) -> Tensor:
        return store.latents(
            examples[:count], lambda one: load_picture(one, 4), encoder, progress=False
        )

    before = get_all(2000)
    assert encoder.seen == 2000
    after = get_all(2001)
    assert encoder.seen == 2001
    assert torch.equal(after[:2000], before)


@pytest.mark.parametrize("masked", [False, True])
def test_states_of_captions_are_made_once_and_without_masked_padding(
    tmp_path: Path, masked: bool
) -> None:
    ids = torch.arange(30).reshape(10, 3)
    mask = torch.ones(10, 3, dtype=torch.bool)
    mask[::2, 2] = False
    seen: list[int] = []

    def encode(tokens: Tokens) -> TextStates:
        seen.extend(tokens.ids[:, 0].tolist())
        states = tokens.ids[..., None].float() * torch.tensor([1.0, -1.0])
        return TextStates(states, tokens.mask if masked else None, tokens.cut)

    def get_some(count: int, weights: str = "w") -> list[Tensor]:
        tokens = Tokens(ids[:count], mask[:count], [""] * count)
        return TextCache(tmp_path, weights, "0").states(tokens, encode, progress=False)

    get_some(8)
    states = get_some(10)
    assert sorted(seen) == ids[:, 0].tolist()
    assert [len(one) for one in states] == ([2, 3] * 5 if masked else [3] * 10)
    for one, row in zip(states, ids, strict=True):
        assert torch.equal(one[:, 0], row[: len(one)].float())
    get_some(1, "other weights")
    assert len(seen) == 11


def test_a_cache_that_is_deleted_meanwhile_costs_nothing_but_time(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD", 2)
    store, encoder = LatentCache(tmp_path / "cache", "w", "8 px"), Encoder()
    whole = get(store, examples, encoder)

    def deleting(pictures: Tensor) -> Tensor:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return encoder(pictures)

    for path in (tmp_path / "cache").rglob("*.safetensors"):
        path.write_bytes(b"")
    again = store.latents(
        examples, lambda one: load_picture(one, 8), deleting, batch_size=2, progress=False
    )
    assert torch.equal(again, whole)


def test_the_hash_of_weights_sees_every_bit_name_type_and_shape() -> None:
    base = {"a": torch.arange(4.0), "b": torch.tensor(1, dtype=torch.int64)}
    same = dict(reversed({key: value.clone() for key, value in base.items()}.items()))
    assert weights_hash(base) == weights_hash(same)
    changed = base["a"].clone()
    changed.view(torch.int32)[2] ^= 1
    others = [
        base | {"a": changed},
        base | {"a": base["a"].reshape(2, 2)},
        base | {"a": base["a"].view(torch.int32)},
        base | {"a": base["a"].bfloat16()},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"]},
    ]
    assert len({weights_hash(weights) for weights in (base, *others)}) == 7
