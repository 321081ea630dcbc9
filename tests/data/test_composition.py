"""Composed pictures: pure functions of (seed, number), with captions that are true."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shapes import shape_folder

from latentdiff.cli import main
from latentdiff.data.colours import PAINTS, dominant, paint, region
from latentdiff.data.composed_folder import CAPTIONS
from latentdiff.data.composition import (
    PLACES,
    SHARES,
    Composer,
    Scene,
    plain_captions,
    read_rows,
    read_things,
)
from latentdiff.data.cutouts import parts, thing_mask, transparency
from latentdiff.data.held_out import (
    COLOURED,
    SYNONYMS,
    has_synonym,
    is_held_out,
    is_held_out_pair,
)
from latentdiff.data.pool import BLOCK, Pool, read_all
from latentdiff.data.wording import Naming, is_plural, naming, plural
from latentdiff.data.wordnet import WordNet
from latentdiff.errors import UserError
from latentdiff.metrics.following import Shapes, colour_of, count_of
from latentdiff.pictures import open_picture
from latentdiff.random_numbers import philox

SAMPLES = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shape_folder(tmp_path_factory.mktemp("shapes") / "folder")


@pytest.fixture(scope="module")
def composer(root: Path) -> Composer:
    rows = read_rows(root)
    return Composer(rows, *read_things(root, rows, None), seed=3)


@pytest.fixture(scope="module")
def samples(composer: Composer) -> list[tuple[np.ndarray, str, Scene]]:
    return [composer.sample(number) for number in range(SAMPLES)]


def test_a_sample_is_a_function_of_seed_and_number(root: Path, composer: Composer) -> None:
    rows = read_rows(root)
    again = Composer(rows, *read_things(root, rows, None), seed=3)
    for number in (17, 2, 5):
        picture, caption, scene = composer.sample(number)
        other, told, seen = again.sample(number)
        assert (caption, scene) == (told, seen)
        assert np.array_equal(picture, other)
    assert composer.sample(1)[1:] != composer.sample(2)[1:]


def test_a_folder_of_them_holds_the_plain_ones_too(
    root: Path, composer: Composer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "composed"
    command = ["data", "compose", str(root), str(out), "--count", "9", "--seed", "3"]
    assert main(command) == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    plain = [row for row in rows if row["kind"] == "plain"]
    assert len(plain) == len(read_rows(root)) == len(rows) - 9
    assert all(1 < len(row["captions"]) <= CAPTIONS for row in plain)
    for number, row in enumerate(rows[len(plain) :]):
        picture, caption, scene = composer.sample(number)
        assert (row["captions"], row["kind"]) == ([caption], scene.kind)
        assert np.array_equal(np.asarray(open_picture(out / row["file_name"])), picture)
    assert main(command) == 2  # never overwritten
    (root / "fewer").mkdir()
    (root / "fewer/metadata.jsonl").write_text('{"file_name": "a.png", "split": "train"}')
    capsys.readouterr()
    assert main(["data", "compose", str(root / "fewer"), str(tmp_path / "other")]) == 2
    assert "lacks the field 'skin_tone'" in capsys.readouterr().err


def test_pictures_with_a_skin_tone_are_written_and_not_composed(root: Path, tmp_path: Path) -> None:
    """With `--skin-tones` the plain ones are more, and the composed ones the same."""
    rows = read_rows(root)
    shutil.copytree(root / "images", tmp_path / "folder/images")
    lines = [row | {"skin_tone": "dark"} if at in (0, 4) else row for at, row in enumerate(rows)]
    (tmp_path / "folder/metadata.jsonl").write_text("\n".join(json.dumps(row) for row in lines))
    made: list[tuple[list[str], list[bytes]]] = []
    for more in ([], ["--skin-tones"]):
        out = tmp_path / f"composed{len(more)}"
        command = ["data", "compose", str(tmp_path / "folder"), str(out), "--count=5", *more]
        assert main(command) == 0
        told = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
        assert len(told) == len(rows) - 2 * (not more) + 5
        drawn = [(out / row["file_name"]).read_bytes() for row in told[-5:]]
        made.append(([row["captions"][0] for row in told[-5:]], drawn))
    assert made[0] == made[1]


def test_every_kind_comes(samples: list[tuple[np.ndarray, str, Scene]]) -> None:
    kinds = Counter(scene.kind for _, _, scene in samples)
    assert set(kinds) == set(SHARES)


def test_colours_in_captions_are_the_pictures(
    samples: list[tuple[np.ndarray, str, Scene]],
) -> None:
    found = [(p, c, s) for p, c, s in samples if s.kind == "colour"]
    for picture, caption, scene in found:
        assert scene.colours[0] in caption.split()
        assert colour_of(picture) == scene.colours[0], caption


def test_counts_in_captions_are_the_pictures(samples: list[tuple[np.ndarray, str, Scene]]) -> None:
    for picture, caption, scene in samples:
        if scene.kind == "count":
            assert count_of(picture) == scene.count, caption


def test_pairs_are_where_the_caption_says(
    composer: Composer, samples: list[tuple[np.ndarray, str, Scene]]
) -> None:
    things = composer.things
    shapes = Shapes(composer.pictures, composer.alphas, [thing.base for thing in things])
    right = []
    for picture, caption, scene in samples:
        if scene.kind != "pair":
            continue
        first, second = ({things[row].base} for row in scene.things)
        if " right of " in caption or " below " in caption or " under " in caption:
            first, second = second, first
        down = any(word in caption for word in (" above ", " over ", " on top of ", " below ",
                                                " under "))  # fmt: skip
        right.append(shapes.shows_both(picture, first, second, down))
    assert len(right) > 10
    assert sum(right) / len(right) > 0.9


def test_small_things_are_where_the_caption_says(
    samples: list[tuple[np.ndarray, str, Scene]],
) -> None:
    for picture, caption, scene in samples:
        if scene.kind == "place":
            ys, xs = np.nonzero(thing_mask(picture))
            x, y = PLACES[scene.form]
            assert abs((xs.min() + xs.max()) / 254 - (0.2 + 0.6 * x)) < 0.15, caption
            assert abs((ys.min() + ys.max()) / 254 - (0.2 + 0.6 * y)) < 0.15, caption


def test_backgrounds_have_their_colour(samples: list[tuple[np.ndarray, str, Scene]]) -> None:
    for picture, caption, scene in samples:
        if scene.background is not None:
            corner = picture[:8, :8]
            assert dominant(corner, np.ones((8, 8), bool))[0] == scene.background, caption


def test_nothing_that_is_held_out_is_said_or_shown(
    composer: Composer, samples: list[tuple[np.ndarray, str, Scene]]
) -> None:
    for _, caption, scene in samples:
        assert not has_synonym(caption)
        for row, colour in zip(scene.things, scene.colours, strict=True):
            assert not is_held_out(colour or "", composer.things[row].naming.name)
        if scene.kind == "pair":
            assert not is_held_out_pair(*(composer.things[row].base for row in scene.things))


def test_captions_of_plain_pictures_are_true_and_varied(root: Path, composer: Composer) -> None:
    rows = read_rows(root)
    captions: list[str] = []
    for row, thing in zip(rows, composer.things, strict=True):
        captions = plain_captions(row, thing, philox(0, thing.row), 40)
        assert len(set(captions)) > 5
        assert all(str(row["name"]) in caption for caption in captions)
        assert captions == plain_captions(row, thing, philox(0, thing.row), 40)
    styled = [c for c in captions if "flat" in c]
    assert 20 < len(styled) < 40


def test_processes_make_what_one_makes(root: Path, composer: Composer) -> None:
    rows = read_rows(root)
    things, pictures, alphas = read_all(root, rows, None, 128, 2)
    assert things == list(composer.things)
    assert np.array_equal(pictures, composer.pictures)
    assert np.array_equal(alphas, composer.alphas)

    def encode(captions: list[str]) -> np.ndarray:
        return np.array([[len(caption)] for caption in captions], np.int16)

    pool = Pool(composer, encode, BLOCK, 1, 2)
    for process in pool.processes:
        process.join()
    assert pool.ready().tolist() == [0]
    picture, caption, _ = composer.sample(BLOCK - 1)
    assert np.array_equal(pool.pictures[BLOCK - 1], picture)
    assert pool.tokens[BLOCK - 1, 0] == len(caption)


@pytest.mark.parametrize("colour", sorted(PAINTS))
def test_a_painted_thing_has_its_colour_and_shading(composer: Composer, colour: str) -> None:
    thing = composer.things[0]
    picture, mask = composer.pictures[0], composer.alphas[0] > 127
    painted = paint(picture, region(picture, mask, thing.colour), colour)
    assert dominant(painted, mask)[0] == colour
    assert np.array_equal(painted[~mask], picture[~mask])


def test_a_mask_holds_the_white_inside_a_thing() -> None:
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[8:24, 8:24] = 90
    picture[12:20, 12:20] = 255
    picture[28:30, 2:4] = 90
    mask = thing_mask(picture)
    assert mask[16, 16]
    assert [int(part.sum()) for part in parts(mask)] == [256, 4]
    assert len(parts(mask, 0.1)) == 1
    assert set(np.unique(transparency(picture))) <= {0, 255}


@pytest.mark.parametrize(
    ("one", "several"),
    [("cat", "cats"), ("slice of pizza", "slices of pizza"), ("mouse", "mice"), ("box", "boxes"),
     ("cherry", "cherries"), ("key", "keys"), ("fish", "fish"), ("church", "churches")],
)  # fmt: skip
def test_plurals(one: str, several: str) -> None:
    assert plural(one) == several


def test_what_is_already_several() -> None:
    assert is_plural("grapes")
    assert not is_plural("glass")
    assert not is_plural("octopus")


def test_held_out_lists() -> None:
    assert len(SYNONYMS) == 100
    assert has_synonym("An Automobile, noto style")
    assert has_synonym("two kittens")
    assert not has_synonym("a car")
    assert is_held_out("pink", "elephant")
    assert not is_held_out("red", "elephant")
    assert all(colour in PAINTS for colour, _ in COLOURED)
    assert is_held_out_pair("a", "b") == is_held_out_pair("b", "a")


WORDS = """\
00000001 03 n 01 entity 0 000 | what is
00000002 06 n 01 artifact 0 001 @ 00000001 n 0000 | a thing made
00000003 06 n 02 rocket 0 projectile 0 001 @ 00000002 n 0000 | it flies; far
00000004 20 n 01 rocket 1 001 @ 00000001 n 0000 | a plant
"""


def test_wordnet(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text("  1 a licence\n" + WORDS)
    (tmp_path / "index.noun").write_text("  1\nrocket n 2 1 @ 2 0 00000004 00000003\n")
    words = WordNet(tmp_path)
    assert words.synonyms("rocket", "Objects") == ["projectile"]
    assert words.broader("rocket", "Objects") == ["artifact"]
    assert words.synonyms("rocket", "Flags") == []
    row = {"name": "rocket", "group": "Objects"}
    assert naming(row, words) == Naming("rocket", ("projectile",), ("artifact",))
    assert naming({"name": "automobile", "group": "Objects"}, words).name == "car"
    with pytest.raises(UserError, match="wordnet-base"):
        WordNet(tmp_path / "nowhere")
