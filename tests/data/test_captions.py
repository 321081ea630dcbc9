"""Captions out of Unicode's names."""

import pytest

from latentdiff.data.captions import phrase, variants, with_article


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("red heart", "a red heart"),
        ("eggplant", "an eggplant"),
        ("hourglass done", "an hourglass done"),
        ("euro banknote", "a euro banknote"),
        ("unicorn", "a unicorn"),
        ("OK hand", "an OK hand"),
        ("bread", "bread"),
        ("meat on bone", "meat on bone"),
        ("grapes", "grapes"),
        ("octopus", "an octopus"),
        ("rhinoceros", "a rhinoceros"),
        ("skull and crossbones", "a skull and crossbones"),
        ("globe showing Americas", "a globe showing Americas"),
        ("person lifting weights", "a person lifting weights"),
        ("women wrestling", "women wrestling"),
        ("five o’clock", "five o’clock"),
        ("Santa Claus", "Santa Claus"),
        ("Japanese castle", "a Japanese castle"),
        ("no smoking", "no smoking"),
        ("family: man, woman, boy", "a family of man, woman, boy"),
        ("man: light skin tone, red hair", "a man with red hair and light skin tone"),
        ("woman: bald", "a woman with no hair"),
        ("kiss: woman, man, dark skin tone", "a kiss, woman and man with dark skin tone"),
        (
            "person walking: medium skin tone, facing right",
            "a person walking with medium skin tone, facing right",
        ),
    ],
)
def test_names_become_running_text(name: str, text: str) -> None:
    assert with_article(phrase(name)) == text


def test_variants_come_with_and_without_style_article_and_keywords() -> None:
    assert variants("eggplant", ["aubergine", "eggplant", "vegetable"], "noto") == [
        "noto emoji of an eggplant",
        "eggplant, noto style",
        "a noto emoji of an eggplant",
        "eggplant",
        "an eggplant",
        "eggplant, aubergine, noto style",
        "eggplant, aubergine vegetable",
        "aubergine vegetable, noto style",
    ]
    assert variants("grapes", ["grapes"], "noto") == [
        "noto emoji of grapes",
        "grapes, noto style",
        "a noto emoji of grapes",
        "grapes",
    ]
    assert variants("cook with dark skin tone", ["chef", "hat"], "noto")[-1] == (
        "chef hat with dark skin tone, noto style"
    )
