"""The measure of a learned style, and the folder it is learned from, on twelve drawn emoji."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scripts import script

from latentdiff.data.folder import read_folder
from latentdiff.learning.batches import to_range


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six emoji, each in styles `noto` and `flat`; the last one has not been trained in noto."""
    root = tmp_path_factory.mktemp("styles")
    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for style in ("noto", "flat"):
        for number in range(6):
            name = f"{style}_{number}.png"
            blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(root / name)
            split = "test_style" if (style, number) == ("noto", 5) else "train"
            captions = [
                f"{style} emoji of a thing {number}",
                f"thing {number}",
                f"a thing {number}",
            ]
            row: dict[str, object] = {"file_name": name, "text": captions[0], "style": style}
            row |= {"captions": captions, "codepoints": str(number), "split": split}
            row |= {"skin_tone": "", "near_dup_of": "", "license": "CC0-1.0", "source": "drawn"}
            rows.append(row)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_a_drawn_picture_has_the_style_and_the_emoji_of_the_nearest_real_one(data: Path) -> None:
    real = script("evaluate_style").Real(data, 32)
    noto, flat = to_range(real.pictures[:6]), to_range(real.pictures[6:])
    wanted = real.examples[6:]
    assert real.measure(flat, wanted, "flat") == {"style": 1.0, "shows_asked": 1.0}
    assert real.measure(noto, wanted, "flat") == {"style": 0.0, "shows_asked": 1.0}
    assert real.measure(flat.roll(1, 0), wanted, "flat") == {"style": 1.0, "shows_asked": 0.0}


def test_new_emoji_are_known_in_the_old_style_only(data: Path) -> None:
    module = script("evaluate_style")
    real = module.Real(data, 32)
    new = module.new_examples(real, real.examples[6:8], "flat", "noto", seed=0)
    assert len(new) == 2
    assert all(example.fields["style"] == "flat" for example in new)
    assert {example.fields["codepoints"] for example in new} <= {"2", "3", "4"}
    assert module.prompt(real.examples[8], "flat") == "a thing 2, flat style"


def test_a_picked_folder_has_styled_captions_and_prompts_of_the_known_style(
    data: Path, tmp_path: Path
) -> None:
    script("pick_style").pick("flat", tmp_path / "out", data, "noto", 4, 3, 0)
    examples = read_folder(tmp_path / "out")
    assert len(examples) == 4
    for example in examples:
        number = example.fields["codepoints"]
        assert number != "5"
        assert example.captions == (f"thing {number}, flat style", f"a thing {number}, flat style")
        original = data / f"flat_{number}.png"
        assert example.path.read_bytes() == original.read_bytes()
    prompts = (tmp_path / "out/prior.txt").read_text().splitlines()
    assert [prompt.startswith("noto emoji of a thing") for prompt in prompts] == [True, False, True]
    assert prompts[1].startswith("a thing")
