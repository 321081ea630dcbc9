"""`latentdiff finetune` and `latentdiff train`: the training scripts as commands of a wheel."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from hatchling.builders.wheel import WheelBuilder
from scripts import ROOT, picture_folder
from shapes import shape_folder
from test_examples import examples
from tiny import tiny_bundle

from latentdiff.cli import main
from latentdiff.formats import location


def unpack_wheel(site: Path) -> None:
    """Every file of the wheel where an installer would put it, as a link."""
    for file in WheelBuilder(str(ROOT)).recurse_included_files():
        place = site / file.distribution_path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.path)


def test_a_wheel_fine_tunes_in_an_empty_folder_under_accelerate(tmp_path: Path) -> None:
    unpack_wheel(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    pictures = picture_folder(tmp_path / "pictures")
    tiny_bundle().save(tmp_path / "model")
    settings = ["optim.steps=1", "optim.batch_size=4", "sample_prompts=[a disc]", "prior.count=2"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    command = ["latentdiff", "finetune", "--data", str(pictures), "--model"]
    done = subprocess.run(
        [sys.executable, *launch, *command, str(tmp_path / "model"), *settings],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "empty/runs/pictures-lora"
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert "\nlatentdiff finetune --data pictures --model model" in (out / "README.md").read_text()


def test_the_commands_of_the_pages_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, and a dry run: all pictures read, one step, one save."""
    AcceleratorState._reset_state(True)  # another test's run may have had another precision
    shape_folder(tmp_path / "MY/PICTURES")
    replace(tiny_bundle(), captions=("a red heart", "a cat")).save(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(location, "_bundled", lambda _: tmp_path / "tiny")
    pages = [ROOT / "README.md", ROOT / "docs/finetune.md"]
    found = [words for page in pages for words in examples(page) if isinstance(words, list)]
    mine = [
        words[1:]
        for words in found
        if words[:4] == ["latentdiff", "finetune", "--data", "MY/PICTURES"]
    ]
    assert mine
    for words in mine:
        assert main([*words, "--dry-run"]) == 0, words
        said = capsys.readouterr().out
        assert "dry run: data, one step and one save are fine" in said
        assert "prior pictures drawn" in said
        assert not list(tmp_path.glob("runs/*/pictures/*"))
    assert len(list(tmp_path.glob("runs/*/prior/*/*.png"))) == 4
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "command",
    [["finetune"], ["train", "autoencoder"], ["train", "diffusion"], ["train", "distill"]],
)
def test_a_command_has_the_options_and_the_mistakes_of_its_script(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"Usage: latentdiff {' '.join(command)} " in said
    assert "--dry-run" in said
    assert main([*command, "--nothing"]) == 2
    assert "error: No such option: --nothing" in capsys.readouterr().err
    given = [] if command == ["finetune"] else ["--config", "no/such.yaml"]
    assert main([*command, *given]) == 2
    assert "error: " in capsys.readouterr().err
