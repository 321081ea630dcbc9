"""The emoji folder: out of made-up files on any machine, out of the packages where they are."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
from PIL import ImageFont, features

from latentdiff.data import emoji
from latentdiff.data.emoji import Emoji, build_emoji_folder, read_emoji_test, read_keywords
from latentdiff.data.examples import load_pictures
from latentdiff.data.folder import read_folder
from latentdiff.errors import UserError

EMOJI_TEST = """\
# group: Smileys & Emotion
# subgroup: heart
2764 FE0F ; fully-qualified # ❤️ E0.6 red heart
2764 ; unqualified # ❤ E0.6 red heart
1F49A ; fully-qualified # 💚 E0.6 green heart
# group: People & Body
# subgroup: person-role
1F469 1F3FB 200D 1F373 ; fully-qualified # 👩🏻‍🍳 E4.0 woman cook: light skin tone
1FAF1 1F3FB 200D 1FAF2 1F3FC ; fully-qualified # 🫱🏻‍🫲🏼 E14.0 handshake: two skin tones
# group: Flags
# subgroup: country-flag
1F1E6 1F1E9 ; fully-qualified # 🇦🇩 E2.0 flag: Andorra
"""
LETTERS = """\
# group: Letters
# subgroup: latin
0041 ; fully-qualified # A E1.0 letter: tall
0042 ; fully-qualified # B E1.0 letter B
0041 0042 0043 ; fully-qualified # ABC E1.0 three letters
0020 ; fully-qualified # _ E1.0 nothing
"""
ANNOTATIONS = """\
<?xml version="1.0" encoding="UTF-8" ?>
<ldml><annotations>
<annotation cp="❤">heart | love</annotation>
<annotation cp="❤" type="tts">red heart</annotation>
<annotation cp="👩‍🍳">chef | cook | woman</annotation>
</annotations></ldml>
"""


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Files like those of the packages; the font is the one inside Pillow, which has letters."""
    test, font, common = tmp_path / "test.txt", tmp_path / "font.ttf", tmp_path / "common"
    test.write_text(LETTERS, "utf-8")
    built_in = ImageFont.load_default(20)
    assert isinstance(built_in, ImageFont.FreeTypeFont)
    font.write_bytes(built_in.font_bytes)
    for name, text in (("annotations", ANNOTATIONS), ("annotationsDerived", "<ldml/>")):
        (common / name).mkdir(parents=True)
        (common / name / "en.xml").write_text(text, "utf-8")
    return {"font": font, "emoji_test": test, "annotations": common}


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_lines_become_emoji_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(EMOJI_TEST, "utf-8")
    red, green, cook = read_emoji_test(path)
    assert (red.text, red.codepoints, red.name, red.version) == ("❤️", "2764", "red heart", 0.6)
    assert (red.group, red.subgroup, red.tone, red.gender) == ("Smileys & Emotion", "heart", "", "")
    assert green.split == "test_colour"
    assert cook.codepoints == "1f469-1f3fb-200d-1f373"
    assert (cook.base, cook.family) == ("1f469-200d-1f373", "person-200d-1f373")
    assert (cook.tone, cook.gender) == ("light", "female")
    row = emoji.metadata(cook, ("chef", "cook"))
    assert row["file_name"] == "images/noto_1f469-1f3fb-200d-1f373.png"
    assert row["text"] == "noto emoji of a woman cook with light skin tone"
    assert "a woman cook with light skin tone" in row["captions"]  # pyright: ignore[reportOperatorIssue]


@pytest.mark.parametrize(
    ("text", "gender", "family"),
    [
        ("👩🏻‍🍳", "female", "person-200d-1f373"),
        ("🧑‍🍳", "", "person-200d-1f373"),
        ("🏃🏿‍♂️", "male", "1f3c3"),
        ("👨‍🦰", "male", "person"),
        ("👩", "female", "person"),
        ("♂️", "male", "2642"),
        ("🍕", "", "1f355"),
    ],
)
def test_relatives_share_a_family(text: str, gender: str, family: str) -> None:
    one = Emoji(text, "", "", "", 1.0, "")
    assert (one.gender, one.family) == (gender, family)


def test_splits_are_rare_disjoint_and_what_they_say() -> None:
    tones = {name: character for character, name in emoji._TONES.items()}
    everyone = [
        Emoji(person + tones.get(tone, "") + "‍" + chr(job), "", "", "", 1.0, tone)
        for person in "👨👩🧑"
        for job in range(0x1F300, 0x1F400)
        for tone in ("", *tones)
    ]
    held: dict[str, set[Emoji]] = {}
    for one in everyone:
        held.setdefault(one.split, set()).add(one)
    share = {split: len(found) / len(everyone) for split, found in held.items()}
    assert 0.005 < share["test_novel"] < 0.04
    assert 0.03 < share["test_gender"] < 0.10
    assert 0.01 < share["test_tone"] < 0.06
    novel = {one.family for one in held["test_novel"]}
    assert not novel & {one.family for one in everyone if one.split != "test_novel"}
    genders = {one.base for one in held["test_gender"]}
    assert not genders & {one.base for one in held["train"] | held["test_tone"]}
    assert all(one.tone for one in held["test_tone"])
    # the split is a property of the emoji, the same on every machine and at every version
    assert Emoji("👩‍🏫", "", "", "", 1.0, "").split == "test_gender"
    assert Emoji("🦄", "", "", "", 1.0, "").split == "test_novel"


def test_keywords_are_found_by_code_points(sources: dict[str, Path]) -> None:
    files = [sources["annotations"] / "annotations" / "en.xml"]
    keywords = read_keywords(files)
    assert keywords == {
        "2764": ("heart", "love"),
        "1f469-200d-1f373": ("chef", "cook", "woman"),
    }
    files[0].write_text("<ldml>")
    with pytest.raises(UserError, match="is not XML"):
        read_keywords(files)


def test_a_build_is_whole_and_the_same_to_the_byte(
    tmp_path: Path, sources: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out" / "emoji"
    if not features.check("raqm"):
        with pytest.raises(UserError, match="libfribidi0"):
            build_emoji_folder(out, 32, **sources, progress=False)
        return
    with caplog.at_level(logging.WARNING):
        assert build_emoji_folder(out, 32, **sources, progress=False) == 2
    assert "2 emoji are left out" in caplog.text  # three letters are not one picture, nothing none
    examples = read_folder(out)
    assert [example.captions[0] for example in examples] == [
        "noto emoji of a letter, tall",
        "noto emoji of a letter B",
    ]
    a, b = load_pictures(examples, 32, progress=False)
    assert a.min() < 60  # black on white, and not the same twice
    assert a.float().mean() > 120
    assert not a.equal(b)

    again = tmp_path / "again"
    again.mkdir()  # an empty folder is as good as none
    build_emoji_folder(again, 32, **sources, progress=False)
    assert hashes(again) == hashes(out)
    assert set(hashes(out)) == {"metadata.jsonl", "images/noto_41.png", "images/noto_42.png"}
    with pytest.raises(UserError, match="already exists"):
        build_emoji_folder(again, 32, **sources, progress=False)
    assert hashes(again) == hashes(out)
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_missing_is_said_with_what_to_install(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    packages = {
        "font": "fonts-noto-color-emoji",
        "emoji_test": "unicode-data",
        "annotations": "unicode-cldr-core",
    }
    for option, package in packages.items():
        spoiled = sources | {option: tmp_path / "nothing"}
        with pytest.raises(UserError, match=f"nothing.*: sudo apt install {package}$"):
            build_emoji_folder(tmp_path / "out", 32, **spoiled, progress=False)
    absent = {option: tmp_path / "nothing" / option for option in sources}
    with pytest.raises(UserError, match="apt install fonts-noto-color-emoji unicode-data unicode"):
        build_emoji_folder(tmp_path / "out", 32, **absent, progress=False)
    no_text = sources | {"emoji_test": sources["font"]}
    with pytest.raises(UserError, match="names no emoji"):
        build_emoji_folder(tmp_path / "out", 32, **no_text, progress=False)
    sources["font"].write_bytes(b"no font")
    with pytest.raises(UserError, match="apt install"):
        build_emoji_folder(tmp_path / "out", 32, **sources, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_packages_of_this_machine(tmp_path: Path) -> None:
    """With them, a few real emoji look right; without, the message says what to install."""
    test = tmp_path / "emoji-test.txt"
    test.write_text(EMOJI_TEST, "utf-8")
    out = tmp_path / "out"
    needed = [emoji.FONT, emoji.ANNOTATIONS / "annotations" / "en.xml"]
    if not (all(path.exists() for path in needed) and features.check("raqm")):
        with pytest.raises(UserError, match="sudo apt install"):
            build_emoji_folder(out, 32, emoji_test=test, progress=False)
        return
    assert build_emoji_folder(out, 32, emoji_test=test, progress=False) == 3
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert "love" in rows[0]["keywords"] or "heart" in rows[0]["keywords"]
    red, green, cook = load_pictures(read_folder(out), 32, progress=False).float()
    assert red[0, 14:18, 14:18].mean() > red[1:, 14:18, 14:18].mean() + 100
    assert green[1, 14:18, 14:18].mean() > green[0, 14:18, 14:18].mean() + 30
    assert cook.std() > 30
    for picture in (red, green):
        assert picture[:, 0, 0].min() > 250  # a white corner
