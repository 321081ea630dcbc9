"""Checkpoints: whole or not there, whatever is done to the disk."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from latentdiff import files
from latentdiff.errors import UserError
from latentdiff.files import sync
from latentdiff.learning.checkpoint import checkpoints, load_newest, save_checkpoint


def save(root: Path, step: int, keep: int = 2) -> Path:
    tensors = {name: {"w": torch.full((4,), float(step))} for name in ("model", "ema", "optimizer")}
    return save_checkpoint(root, step, tensors, {"k": step}, keep)


def truncated(whole: bytes) -> list[bytes | None]:
    return [b"", whole[: len(whole) // 2], whole[:-1]]


def flipped(whole: bytes) -> list[bytes | None]:
    """One bit in every seventh byte, each bit of the eight in turn."""
    return [
        whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :]
        for at in range(0, len(whole), 7)
    ]


FILES = [
    *("model.safetensors", "ema.safetensors", "optimizer.safetensors"),
    *("state.json", "manifest.json"),
]


@pytest.mark.parametrize(
    "damage",
    [truncated, flipped, lambda whole: [None]],
    ids=["truncated", "flipped", "deleted"],
)
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_falls_back_and_names_it(
    tmp_path: Path, name: str, damage: Callable[[bytes], list[bytes | None]]
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    newest, before = checkpoints(tmp_path)
    file = newest / name
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    whole = file.read_bytes()
    for content in damage(whole):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        told: list[str] = []
        found = load_newest(tmp_path, told.append)
        assert found is not None
        assert found[1] == {"k": 2, "step": 2}
        assert all(torch.equal(group["w"], torch.full((4,), 2.0)) for group in found[0].values())
        assert len(told) == 1
        assert newest.name in told[0]
        named = [path.name for path in before.iterdir() if path.name in told[0]]
        assert named == [name], told
    file.write_bytes(whole)
    found = load_newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 3


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint"):
        load_newest(tmp_path)
    assert len(checkpoints(tmp_path)) == 2


def test_a_damaged_checkpoint_counts_as_none_of_those_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    (checkpoints(tmp_path)[0] / "model.safetensors").unlink()  # 30: the run goes on at 20
    save(tmp_path, 25)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000025", "step-00000020"]


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays(tmp_path: Path) -> None:
    """A limit on the size of files: the kernel refuses in the middle of a write."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(UserError, match=r"step-00000003.*step-00000002 is untouched") as error:
            save(tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000001"]
    assert not list(tmp_path.glob(".*"))
    found = load_newest(tmp_path, pytest.fail)
    assert found is not None
    assert found[1]["step"] == 2


def test_what_a_kill_left_half_written_is_removed_by_the_next_save(tmp_path: Path) -> None:
    half = tmp_path / f".step-00000007.{'0a' * 8}.part/step-00000007"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert load_newest(tmp_path) is None
    save(tmp_path, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_every_folder_that_the_first_save_makes_is_synced_into_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", lambda path: (synced.append(path), sync(path)))
    root = tmp_path / "runs/mine/checkpoints"
    save(root, 1)
    above = [tmp_path, tmp_path / "runs", tmp_path / "runs/mine", root]
    assert set(above) <= set(synced)
    synced.clear()
    save(root, 2)
    assert [folder for folder in above if folder in synced] == above[-1:]
