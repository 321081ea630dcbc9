"""The measure of a learned style, and the folder it is learned from, on twelve drawn emoji."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from scripts import script
from typer.testing import CliRunner

from latentdiff.data.folder import read_folder
from latentdiff.data.packing import write_shards
from latentdiff.errors import UserError
from latentdiff.learning.batches import to_range
from latentdiff.learning.card import write_between


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
    real = script("measure/evaluate_style").Real([data], 32)
    noto, flat = to_range(real.pictures[:6]), to_range(real.pictures[6:])
    wanted = real.examples[6:]
    assert real.measure(flat, wanted, "flat") == {"style": 1.0, "shows_asked": 1.0, "both": 1.0}
    assert real.measure(noto, wanted, "flat") == {"style": 0.0, "shows_asked": 1.0, "both": 0.0}
    assert real.measure(flat.roll(1, 0), wanted, "flat") == {
        "style": 1.0,
        "shows_asked": 0.0,
        "both": 0.0,
    }


def test_what_is_asked_for_is_seen_or_new_or_untouched(data: Path, tmp_path: Path) -> None:
    """New emoji are known in the old style only; untouched ones neither seen nor prior prompts."""
    module = script("measure/evaluate_style")
    real = module.Real([data], 32)
    script("measure/pick_style").pick("flat", tmp_path / "out", data, "noto", 2, 0, 0)
    taught = {example.fields["codepoints"] for example in read_folder(tmp_path / "out")}
    (tmp_path / "prior").write_text(f"a thing {min({'0', '1', '2', '3', '4'} - taught)}\n\n")
    prior = module.read_lines(tmp_path / "prior", tmp_path)
    groups = module.choose(real, "flat", "noto", tmp_path / "out", prior, 9, 0)
    found = {
        name: {(example.fields["style"], example.fields["codepoints"]) for example in examples}
        for name, (examples, _) in groups.items()
    }
    known = {"0", "1", "2", "3", "4"} - taught
    assert found["seen"] == {("flat", number) for number in taught}
    assert found["new"] < {("flat", number) for number in known}
    assert found["untouched"] == {("noto", number) for number in known - {min(known)}}
    for example, asked in zip(*groups["new"], strict=True):
        assert asked == f"a thing {example.fields['codepoints']}, flat style"
    for example, asked in zip(*groups["untouched"], strict=True):
        assert asked == f"noto emoji of a thing {example.fields['codepoints']}"
    with pytest.raises(UserError, match="cannot read the prior prompts"):
        module.read_lines(tmp_path / "no", tmp_path)


def test_a_picked_folder_has_styled_captions_and_prompts_of_the_known_style(
    data: Path, tmp_path: Path
) -> None:
    script("measure/pick_style").pick("flat", tmp_path / "out", data, "noto", 4, 3, 0)
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


def test_a_folder_with_the_four_fields_will_do_in_shards_too(data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    bare = tmp_path / "bare"
    bare.mkdir()
    for row in rows:
        for key in ("near_dup_of", "license", "source", "captions"):
            del row[key]
        (bare / row["file_name"]).write_bytes((data / row["file_name"]).read_bytes())
    (bare / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_shards(bare, tmp_path / "shards", 100)
    for name, root in (("a", bare), ("b", tmp_path / "shards/00000.tar")):
        script("measure/pick_style").pick("flat", tmp_path / name, root, "noto", 4, 3, 0)
    one, other = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    assert [e.read() for e in one] == [e.read() for e in other]
    assert all(e.captions[0].endswith(", flat style") for e in one)
    assert (
        len(script("measure/evaluate_style").Real([tmp_path / "shards/00000.tar"], 32).examples)
        == 12
    )


def test_what_cannot_be_measured_is_a_line(data: Path, tmp_path: Path) -> None:
    evaluate, style = script("measure/evaluate"), script("measure/evaluate_style")
    real = evaluate.RealPictures(data, 32, ["noto"])
    assert evaluate.choose_splits(real, None) == ["train", "test_style"]
    with pytest.raises(UserError, match=r"split 'tarin'.*'test_style', 'train'"):
        evaluate.choose_splits(real, ["train", "tarin"])
    with pytest.raises(UserError, match="'train'"):
        evaluate.choose_splits(evaluate.RealPictures(data, 32, ["nto"]), None)
    with pytest.raises(UserError, match=r"'faces' shows .* flat, noto"):
        style.choose(style.Real([data], 32), "faces", "noto", data, set(), 9, 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes((data / "noto_0.png").read_bytes())
    (tmp_path / "a/x.txt").write_text("x")
    for reader in (
        lambda: style.Real([tmp_path / "a"], 32),
        lambda: evaluate.RealPictures(tmp_path / "a", 32, []),
    ):
        with pytest.raises(UserError, match=r"lack the field 'style': x\.png"):
            reader()


@pytest.mark.parametrize("name", ["measure/evaluate", "measure/evaluate_inpainting"])
def test_a_card_without_marks_is_told_before_the_work(name: str, tmp_path: Path) -> None:
    """No model and no pictures are there: a later look would complain of those."""
    (tmp_path / "README.md").write_text("# A card\n")
    options: dict[str, Path | None] = {"model": tmp_path, "data": tmp_path / "none"}
    options["card"] = tmp_path / "README.md" if name == "measure/evaluate_inpainting" else None
    words = [f"--{key}={value}" for key, value in options.items() if value]
    app = typer.Typer()
    app.command()(script(name).main)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "lacks the marks" in done.output


def test_text_goes_between_the_marks_or_nowhere(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<b>old</b>\nz \u00e9\n", "utf-8")
    write_between(page, "<b>", "</b>", "new")
    assert page.read_text("utf-8") == "a\n<b>\nnew\n</b>\nz \u00e9\n"
    with pytest.raises(UserError, match="lacks the marks"):
        write_between(page, "<c>", "</b>", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_what_is_kept_is_a_share_of_what_was_there() -> None:
    kept = script("measure/evaluate_style").kept
    values = {"untouched, before": {"shows_asked": 0.8}, "untouched, after": {"shows_asked": 0.6}}
    assert kept(values) == 0.75
    assert kept({}) is None


def test_every_setting_to_compare_is_one_of_a_fine_tune(tmp_path: Path) -> None:
    """Options too: each is handed to the fine-tune's own command line, which stops at no data."""
    compare, finetune = script("measure/compare_style"), script("finetune")
    app = typer.Typer()
    app.command()(finetune.main)
    for name in compare.SETTINGS:
        words = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / compare.slug(name))]
        done = CliRunner().invoke(app, [*words, *compare.words_of(name, "flat")])
        assert "there is no picture folder" in done.stderr, (name, done.stderr)


def test_a_row_of_the_comparison_is_the_mean_of_its_runs() -> None:
    compare = script("measure/compare_style")
    curves = [[[0, 1.0], [50, 0.8]], [[0, 1.0], [50, 0.79]]]
    runs = [
        {
            "seen, after": {"style": seen, "both": 0.0},
            "new, after": {"style": 0.5, "both": both},
            "kept": 0.9,
            "curve": one,
            "seconds": 90,
        }
        for seen, both, one in zip((0.8, 0.9), (0.2, 0.3), curves, strict=True)
    ]
    assert compare.row("x", runs) == "| x | 85.0 | 50.0 | 25.0 | 90 | 0.05 | 1.5 |"
    assert compare.gap(curves[0], curves[0][:0]) is None
