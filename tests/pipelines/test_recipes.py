"""The recipes draw what the pipeline draws."""

import re
import runpy
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny import tiny_bundle
from xl import TEXT, TEXT_2, UNET, VAE

from latentdiff import LatentDiffusionPipeline

RECIPES = Path(__file__).parents[2] / "pipelines"


@pytest.mark.parametrize("tower", ["clip", "t5"])
def test_text_to_image_by_hand_is_the_pipeline(tower: Literal["clip", "t5"]) -> None:
    bundle = tiny_bundle(tower=tower)
    draw = runpy.run_path(str(RECIPES / "text_to_image.py"))["draw"]
    by_hand = draw(bundle, "a red heart", steps=3, guidance_scale=4.0, seed=7)
    pipe = LatentDiffusionPipeline(bundle)
    by_one_call = pipe(
        "a red heart", num_inference_steps=3, seed=7, output_type="pt", progress=False
    ).images
    assert torch.equal((by_hand / 2 + 0.5).clamp(0, 1), by_one_call)


def test_a_model_of_xls_shape_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth as wide: each line of the command, with numbers in it; and the real configs."""
    script = str(RECIPES / "measure" / "xl_size.py")
    monkeypatch.setattr("sys.argv", [script, "--small", "--size", "16", "--steps", "2"])
    runpy.run_path(script, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"unet [\d.]+ M, vae [\d.]+ M, text_encoder .* M", lines[0])
    assert re.fullmatch(r"texts and steps: [\d.]+ [\d.]+ s, peak [\d.]+ GB", lines[2])
    assert lines[3].startswith("decoded: ")
    told = runpy.run_path(script)["configs"](small=False)
    for config, published in zip(told, (UNET, VAE, TEXT, TEXT_2), strict=True):
        both = config.keys() & published.keys()
        assert len(both) >= 5
        assert {key: config[key] for key in both} == {key: published[key] for key in both}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("text_to_image cat --model nope", "nope: no such model"),
        ("edit nope.png cat", "cannot open picture nope.png"),
        ("interpolate a b --number 0", "at least one place"),
        ("measure/inversion_error --model nope", "nope: no such model"),
        ("measure/time_edits --model nope", "nope: no such model"),
        ("measure/bench --model nope", "nope: no such model"),
        ("refine cat --base nope --refiner nope", "nope: no such model"),
        ("measure/peak_memory --model nope", "nope: no such model"),
        ("measure/page --browser nope", "--browser: no Chromium here"),
        ("measure/xl_size --engine nope", "invalid choice: 'nope'"),
        ("measure/solver_orders --draws 0", "--draws: at least 1"),
        ("measure/solver_orders --only nope", "invalid choice: 'nope'"),
        ("measure/compare_solvers --solvers nope", "invalid choice: 'nope'"),
        (
            "measure/compare_solvers --steps 4 0",
            "steps: must be a whole number from 1 to 1000, not 0",
        ),
        ("measure/compare_solvers --out /proc/version/x", "cannot write to /proc/version/x"),
        ("measure/editing_gallery --out /proc/version/x", "cannot write to /proc/version/x"),
    ],
)
def test_a_mistake_is_one_line(
    line: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *arguments = line.split()
    monkeypatch.setattr("sys.argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    error = said.err.splitlines()[-1]
    assert "error: " in error
    assert told in error
