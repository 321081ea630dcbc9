"""What a model knows by its captions: `latentdiff words`, and lines about prompts far from it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import CAPTIONS, tiny_bundle, tiny_xl
from torch.nn.functional import cosine_similarity

from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.data.captions import with_article
from latentdiff.data.held_out import SYNONYMS
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.pipeline import vocabulary
from latentdiff.pipeline.vocabulary import cosines, far, near

ROOT = Path(__file__).parents[2]
KNOWN = ("a cat", "a dog face", "a red apple", "a mouse", "grapes", "a flower", "a wilted flower",
         "a rose", "a bouquet", "a hammer", "an automobile", "a picture")  # fmt: skip


@pytest.fixture(scope="module")
def taught() -> Bundle:
    """A model whose text encoder a sentence encoder has taught what words mean."""
    return replace(Bundle.load(ROOT / "assets/emoji128", device="cpu"), captions=KNOWN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return replace(tiny_bundle(), captions=CAPTIONS).save(tmp_path_factory.mktemp("m") / "tiny")


@pytest.mark.parametrize(
    "bundle", [tiny_bundle(), tiny_bundle(tower="t5"), tiny_xl()], ids=["clip", "t5", "xl"]
)
def test_cosines_are_of_the_states_at_the_end_of_each_text_read_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_AT_ONCE", 3)
    tower = next(iter(bundle.conditioner.towers.values()))

    def end(text: str) -> torch.Tensor:
        with torch.no_grad():
            return tower.encode([text]).states[0, int(tower.tokenize([text]).mask.sum()) - 1]

    texts = ["a heart", "the flag of a sad dog, holding hands with a very small green cat face"]
    expected = torch.stack(
        [torch.stack([cosine_similarity(end(t), end(c), 0) for c in CAPTIONS]) for t in texts]
    )
    found = cosines(replace(bundle, captions=CAPTIONS), texts)
    assert expected.max() - expected.min() > 0.05
    assert (found - expected).abs().max() < 1e-5


def test_the_text_itself_comes_first_then_its_words_then_what_is_near(taught: Bundle) -> None:
    assert near(taught, "a Flower", 3)[:2] == ["a flower", "a wilted flower"]
    assert set(near(taught, "flowers", 4)) == {"a flower", "a wilted flower", "a rose", "a bouquet"}
    assert near(taught, "kitten", 1) == ["a cat"]
    assert near(taught, "red", 1) == ["a red apple"]
    assert sorted(near(taught, "a red automobile", 100)) == sorted(KNOWN)


@pytest.mark.parametrize(
    "prompt",
    [
        *("two red apples", "a cat next to a dog on a blue background", "mice", "a GRAPE"),
        *(
            "a hammer of Schrödinger",
            "(flower:1.3), 4k",
            "a picture",
            "the",
            "!?",
        ),  # known, or none
        *("a kitten", "a puppy", "a car"),  # no word of a caption, but near
    ],
)
def test_what_shares_a_word_with_a_caption_or_is_near_one_is_not_far(
    taught: Bundle, prompt: str
) -> None:
    assert not list(far(taught, [prompt]))


def test_far_prompts_are_told_once_with_the_nearest_captions(taught: Bundle) -> None:
    strange = [
        "quantum chromodynamics",
        "a picture of jurisprudence",
        "a twemoji of a purple xylophone",
    ]
    told = dict(far(taught, ["a cat", *strange, strange[0]], 2))
    assert list(told) == strange
    for prompt, nearest in told.items():
        best = cosines(taught, [prompt])[0].topk(2)
        assert nearest == [KNOWN[place] for place in best.indices]
    assert not list(far(replace(taught, captions=()), strange))


def test_the_text_encoder_is_asked_of_strange_prompts_alone(
    taught: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def counted(bundle: Bundle, texts: Sequence[str]) -> torch.Tensor:
        asked.append(texts)
        return cosines(bundle, texts)

    monkeypatch.setattr(vocabulary, "cosines", counted)
    list(far(taught, ["a cat", "three green apples"]))
    assert not asked
    list(far(replace(taught, captions=("a cat",) * 5001), ["algebra"]))
    assert not asked
    list(far(taught, ["a cat", "algebra"]))
    assert asked == [["algebra"]]


def test_generate_tells_of_far_prompts_of_models_with_captions_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_FAR", 2.0)  # of a tiny random text encoder

    def said(*arguments: str) -> list[str]:
        options = ["--steps", "1", "--seed", "7", "--out", str(tmp_path / "out")]
        assert main(["generate", *arguments, *options]) == 0
        return capsys.readouterr().err.splitlines()

    of = ("--model", str(model))
    seed, line = said("algebra", "a heart", "-n", "2", *of)
    assert seed == "seed 7"
    start = f"warning: 'algebra' is far from all captions of {model}; the nearest are "
    nearest, _, more = line.removeprefix(start).partition(" (`latentdiff words`")
    assert (line.startswith(start), more) == (True, " lists more)")
    assert nearest.split("; ") == near(Bundle.load(model), "algebra", 3)
    assert said("two hearts", *of) == ["seed 7"]
    add_lora(other := tiny_bundle(), rank=2)
    save_lora(lora_of(other), lora := tmp_path / "words.safetensors")
    assert said("algebra", *of, "--lora", str(lora)) == ["seed 7"]
    assert said("algebra", "--model", str(tiny_bundle().save(tmp_path / "bare"))) == ["seed 7"]


def test_of_very_many_captions_some_are_looked_at(
    taught: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with a word of the text all, the rest a sample; each keeps the place it would have."""
    many = tuple(f"thing {number}" for number in range(100_000))
    asked: list[int] = []

    def counted(bundle: Bundle, texts: Sequence[str]) -> torch.Tensor:
        asked.append(len(bundle.captions))
        return cosines(bundle, texts)

    monkeypatch.setattr(vocabulary, "cosines", counted)
    monkeypatch.setattr(vocabulary, "_MOST", 40)
    with pytest.warns(UserWarning, match=r"has 100,012 captions; 40 are looked at"):
        found = near(replace(taught, captions=many + KNOWN), "a flower", 99)
    assert found[:2] == ["a flower", "a wilted flower"]
    assert 30 < len(found) == asked[0] <= 40
    numbers = [int(caption.split()[-1]) for caption in found if caption.startswith("thing")]
    assert max(numbers) - min(numbers) > 90_000
    with pytest.warns(UserWarning, match="40 are looked at"):
        known = near(replace(taught, captions=many), "thing", 99)
    assert len(known) == asked[1] == 40


def test_words_lists_captions_and_refuses_a_model_that_carries_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["words", "hearts", "--model", str(model), "-n", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(lines[:2]) == {"a red heart", "a green heart with an arrow"}
    assert lines == near(Bundle.load(model), "hearts", 3)
    bare = tiny_bundle().save(tmp_path / "bare")
    assert main(["words", "heart", "--model", str(bare)]) == 2
    told = f"error: {bare} has no captions.txt, so nothing tells what it knows.\n"
    assert capsys.readouterr().err == told
    assert main(["words", " ", "--model", str(model)]) == 2
    assert capsys.readouterr().err == "error: WORD: it is empty; say what to look for, as flower.\n"


def test_the_bundled_model_knows_its_captions_and_most_other_words_for_its_things() -> None:
    bundle = Bundle.load(device="cpu")
    assert not list(far(bundle, bundle.captions))
    unknown = [text for text, _ in far(bundle, [with_article(word) for word in SYNONYMS])]
    assert 1 <= len(unknown) <= 10
    assert list(far(bundle, ["quantum chromodynamics"]))
