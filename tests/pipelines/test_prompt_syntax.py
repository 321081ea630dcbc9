"""A1111's syntax: the examples of docs/prompts.md, and what the network is told at each step."""

import contextlib
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_bundle, tiny_clip, tower_of, unet_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.cli import main
from latentdiff.lora import add_lora, lora_of, lora_scales, save_lora
from latentdiff.models.long_prompts import long_states
from latentdiff.models.prompt_weights import multiply, parse_weights
from latentdiff.models.text_encoders import Reading, encode_tokens
from latentdiff.pipeline import Request
from latentdiff.pipeline.prompt_syntax import parse, schedule
from latentdiff.pipeline.texts import encoded, texts_of

DOC = Path(__file__).parents[2] / "docs" / "prompts.md"
BLOCKS = re.findall(r"```(steps|and|weights|chunks|loras)\n(.*?)```", DOC.read_text("utf-8"), re.S)


def examples(kind: str) -> list[Any]:
    """The prompts of a block of the document, each with the lines below it."""
    return [
        pytest.param(found[1], [line.strip() for line in found[2].split("\n")[:-1]], id=found[1])
        for name, block in BLOCKS
        if name == kind
        for found in re.finditer(r"^(\S.*)\n((?:[ ]{2}.*\n|\n)*)", block, re.M)
    ]


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_the_document_has_at_least_60_examples() -> None:
    assert sum(len(examples(kind)) for kind in dict(BLOCKS)) >= 60


@pytest.mark.parametrize(("prompt", "expected"), examples("steps"))
def test_words_that_change(prompt: str, expected: list[str]) -> None:
    wanted: list[str] = []
    for line in expected:
        steps, _, text = line.partition(" ")
        first, last = map(int, steps.split("-"))
        wanted += [text] * (last - first + 1)
    assert [squeezed(text) for text in schedule(prompt).texts(10)] == wanted


@pytest.mark.parametrize(("prompt", "expected"), examples("and"))
def test_prompts_that_and_joins(prompt: str, expected: list[str]) -> None:
    parts = parse(prompt).parts
    wanted = [line.partition(" ") for line in expected]
    assert [weight for _, weight in parts] == [float(weight) for weight, _, _ in wanted]
    for (words, _), (_, _, text) in zip(parts, wanted, strict=True):
        assert [*map(squeezed, words.texts(10))] == schedule(text).texts(10)


@pytest.mark.parametrize(("prompt", "expected"), examples("weights"))
def test_weights(prompt: str, expected: list[str]) -> None:
    got = [(squeezed(text), round(weight, 4)) for text, weight in parse_weights(prompt)]
    pieces = [piece.partition("×") for piece in expected[0].split(" | ")]
    assert got == [(text.strip(), float(weight or 1)) for text, _, weight in pieces]
    assert schedule(prompt).at(1, 1) == prompt


@pytest.mark.parametrize(("prompt", "expected"), examples("loras"))
def test_loras(prompt: str, expected: list[str]) -> None:
    named = (line.split() for line in expected)
    assert parse(prompt).loras == {name: float(scale) for name, scale in named}


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "expected"), examples("chunks"))
@pytest.mark.parametrize("skip", [0, 1])
def test_states_of_long_prompts_are_those_of_each_chunk_alone(
    prompt: str, expected: list[str], skip: int
) -> None:
    """Computed without the code that parts and weighs: the network, a chunk at a time."""
    tower: Any = tiny_clip()
    inside = tower.window - 2
    start, end = (token for token, _ in encode_tokens(tower.tokenizer, ""))
    weight = 1.3 if "1.3" in prompt else 1.0
    states: list[Tensor] = []
    for text in expected:
        tokens = [token for token, _ in encode_tokens(tower.tokenizer, text)[1:-1]]
        for at in range(0, max(1, len(tokens)), inside):
            words = tokens[at : at + inside]
            ids = torch.tensor([[start, *words, *[end] * (tower.window - 1 - len(words))]])
            z = tower.model(ids, output_hidden_states=True).hidden_states[-1 - skip][0]
            z = tower.model.final_layer_norm(z)
            scale = torch.ones(tower.window, 1)
            scale[1 : 1 + len(words)] = weight
            states.append(z * scale * (z.mean() / (z * scale).mean()))
    got = long_states(tower, [prompt], Reading("a1111", True, skip)).states[0]
    assert got.shape == torch.cat(states).shape
    assert (got - torch.cat(states)).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(20))
def test_a1111s_rule_is_its_formula(seed: int) -> None:
    """Value by value in Python's own numbers: z * m, then all times mean(z) / mean(z * m)."""
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 5, 3, generator=random) + 0.5
    weights = torch.rand(2, 5, generator=random) * 2
    got = multiply(states, weights)
    for chunk in range(2):
        z = states[chunk].double().tolist()
        m = weights[chunk].double().tolist()
        weighted = [[value * m[token] for value in row] for token, row in enumerate(z)]
        before, after = (sum(map(sum, rows)) / 15 for rows in (z, weighted))
        expected = torch.tensor([[value * before / after for value in row] for row in weighted])
        assert (got[chunk] - expected).abs().max() < 1e-5 * expected.abs().max()


class Told:
    """The text states of each call of a network, and what it was told of them."""

    def __init__(self, pipe: LatentDiffusionPipeline) -> None:
        self.states: list[Tensor] = []
        unet_of(pipe.bundle).register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: object, inputs: object, named: dict[str, Tensor]) -> None:
        self.states.append(named["encoder_hidden_states"])


def drawn(pipe: LatentDiffusionPipeline, prompt: Any, **changed: Any) -> Tensor:
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "pt", "seed": 3}
    given |= {"progress": False, "prompt_syntax": "a1111"}
    return pipe(prompt, **given | changed).images


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp-2m"])
def test_the_network_is_told_the_words_of_the_step(solver: str) -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    told = Told(pipe)
    negative = "[sad:happy:1]"
    drawn(pipe, "a [cat:dog:0.5]", solver=solver, negative_prompt=negative)
    tower = tower_of(pipe.bundle)
    texts = ["a cat", "a dog", "sad", "happy"]
    cat, dog, sad, happy = tower.encode(texts).states
    calls = len(told.states) // 4 if solver != "heun" else 2
    wanted = [(sad, cat), (happy, cat), (happy, dog), (happy, dog)]
    for number, states in enumerate(told.states):
        expected = torch.stack(wanted[min(3, number // calls)])
        assert (states - expected).abs().max() < 1e-5, number


def test_words_that_change_go_with_everything() -> None:
    """Perturbed attention, further prompts, two prompts that join unequally many, an edit."""
    pipe = LatentDiffusionPipeline(tiny_bundle())
    prompts = ["a [cat|dog] AND a hat:0.5", "pizza"]
    rest: dict[str, Any] = {"also": ["a [heart:star:2]:0.3"], "edits": ["pag:2"], "seed": [1, 2]}
    both = drawn(pipe, prompts, **rest)
    for place, prompt in enumerate(prompts):
        alone = drawn(pipe, prompt, **rest | {"seed": 1 + place})
        assert (both[place] - alone[0]).abs().max() < 1e-4
    still = drawn(pipe, ["a cat AND a hat:0.5", "pizza"], **rest)
    assert (still[0] - both[0]).abs().max() > 1e-3
    assert (still[1] - both[1]).abs().max() < 1e-4


def test_a_prompt_that_begins_as_its_negative_is_told_both_to_the_end() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    told = Told(pipe)
    drawn(pipe, "a [cat:dog:0.5]", solver="ddim", negative_prompt="a cat")
    with torch.no_grad():
        cat, dog = tower_of(pipe.bundle).encode(["a cat", "a dog"]).states
    for number, states in enumerate(told.states):
        expected = torch.stack([cat, cat if number < 2 else dog])
        assert (states - expected).abs().max() < 1e-5, number


def test_words_that_last_for_some_steps_may_be_a_whole_part() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    told = Told(pipe)
    drawn(pipe, "a cat AND [a hat::0.5]", guidance_scale=1.0, solver="ddim")
    with torch.no_grad():
        hat, nothing = tower_of(pipe.bundle).encode(["a hat", ""]).states
    assert len(told.states) == 4
    for number, states in enumerate(told.states):
        expected = hat if number < 2 else nothing
        assert min(float((one - expected).abs().max()) for one in states) < 1e-5
    with pytest.raises(UserError, match="weights but no words"):
        drawn(pipe, "a cat AND [()::0.5]")


HEAVY = " AND ".join(
    "[" + "|".join(f"{part}{n}" for n in range(31 - part)) + "]" + " BREAK" * 8 for part in range(9)
)


def test_states_are_shared_and_bounded_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of n texts has n tensors, however the parts come together; too many are refused."""
    pipe = LatentDiffusionPipeline(tiny_bundle())
    request = Request(prompt=HEAVY.replace(" BREAK", ""), prompt_syntax="a1111")
    texts = texts_of(request)
    context = pipe.prepare(Request(prompt="a", num_inference_steps=1)).context
    told = encoded(pipe.bundle, request, texts, context, guided=True, moves=150)
    every = [condition.states for series in told.series() for condition in series]
    assert len(every) > 1000
    assert len({id(states) for states in every}) == sum(31 - part for part in range(9)) + 1

    def refuse(*_: object) -> None:
        raise AssertionError("texts were encoded")

    monkeypatch.setattr(tower_of(pipe.bundle), "states", refuse)
    with pytest.raises(UserError, match=r"'00 .* 244 texts of 9 windows, .* more than 2,048"):
        drawn(pipe, HEAVY, num_inference_steps=150)


def test_and_is_also_and_its_first_weight_is_heard() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    joined = drawn(pipe, "a cat AND a dog:0.5")
    assert torch.equal(joined, drawn(pipe, "a cat", also=["a dog:0.5"]))
    # half a prompt under twice the guidance is all of it
    half = drawn(pipe, "a cat:0.5", guidance_scale=8.0)
    assert (half - drawn(pipe, "a cat", guidance_scale=4.0)).abs().max() < 1e-4


@torch.no_grad()
def test_clip_skip_counts_as_diffusers_does() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    told = Told(pipe)
    drawn(pipe, "a cat", clip_skip=1, guidance_scale=1.0, num_inference_steps=1)
    tower: Any = tower_of(pipe.bundle)
    ids = tower.tokenize(["a cat"]).ids
    hidden = tower.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(told.states[0], tower.model.final_layer_norm(hidden[-2]))
    assert (told.states[0] - tower.encode(["a cat"]).states).abs().max() > 1e-2
    with pytest.raises(UserError, match="clip_skip: must be from 0 to 1 here"):
        drawn(pipe, "a cat", clip_skip=2)
    t5 = LatentDiffusionPipeline(tiny_bundle(tower="t5"))
    with pytest.raises(UserError, match="clip_skip: only a CLIP"):
        drawn(t5, "a cat", clip_skip=1, prompt_syntax="plain")


def test_plain_words_stay_plain_and_a_tag_in_them_is_told() -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    with pytest.warns(UserWarning, match="--syntax a1111"):
        plain = drawn(pipe, "a cat <lora:a:1>", prompt_syntax="plain")
    assert not torch.equal(plain, drawn(pipe, "a cat"))


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a <hypernet:x:1>", "<lora:NAME:0.8> is read"),
        ("a <lora:x:loud>", "<lora:NAME:0.8> is read"),
        ("a <lora:x:1:2>", "<lora:NAME:0.8> is read"),
        ("a <lora:x:1> <lora:x:2>", "twice"),
        ("a <lora:x:1>", "it is not in the model"),
        ("a AND ", "without words"),
        ("a AND b:" + "9" * 400, "too large"),
        ("[" + "|".join(f"{n}" for n in range(40)) + "]", "more than 32"),
        ("<lora:x:1>", "without words"),
        ("[a] " * 9 + "(" * 101 + "a", "nested more than 100 deep"),
    ],
)
def test_what_is_refused(prompt: str, told: str) -> None:
    pipe = LatentDiffusionPipeline(tiny_bundle())
    with pytest.raises(UserError, match=told):
        drawn(pipe, prompt, num_inference_steps=60)
    if prompt == "a <lora:x:1>":
        with pytest.raises(UserError, match="belongs into the prompt"):
            drawn(pipe, "a cat", negative_prompt=prompt)


def test_a_lora_of_a_prompt_is_found_by_the_command_line_and_checked_by_a_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny_bundle()
    model = str(bundle.save(tmp_path / "model"))
    with torch.no_grad():
        for value in add_lora(bundle, rank=2):
            value.normal_(generator=torch.Generator().manual_seed(5))
    (tmp_path / "loras" / "more").mkdir(parents=True)
    file = save_lora(lora_of(bundle), tmp_path / "loras" / "more" / "my style.v1.safetensors")
    command = ["generate", "--syntax", "a1111", "--model", model, "--steps", "2", "--seed", "3"]
    command += ["-o", str(tmp_path / "out")]
    tagged = "a cat <lora:my style.v1:0.5>"
    assert main([*command, tagged, "--lora-dir", str(tmp_path / "loras")]) == 0
    assert main([*command, tagged, "--lora", str(file)]) == 0
    assert main([*command, "a cat", "--lora", f"{file}:0.5"]) == 0
    assert main([*command, "a cat"]) == 0
    pictures = [Path(line).read_bytes() for line in capsys.readouterr().out.split()]
    pixels = [data[data.index(b"IDAT") :] for data in pictures]
    assert pixels[0] == pixels[1] == pixels[2] != pixels[3]
    assert main([*command, "a cat <lora:../more/my style.v1:1>", "--lora-dir", str(tmp_path)]) == 2
    assert "there is no such file among" in capsys.readouterr().err
    pipe = LatentDiffusionPipeline.from_pretrained(model, dtype="float32")
    pipe.load_lora(file, 0.5)
    assert lora_scales(pipe.bundle) == {"my_style_v1": 0.5}
    drawn(pipe, tagged)
    pipe.set_loras({"my_style_v1": 0.7})
    with pytest.raises(UserError, match=r"it is there at 0\.7"):
        drawn(pipe, tagged)


@given(st.text(st.sampled_from("ab ()[]|\\:1.5,\n")))
def test_any_text_parses_and_a_text_without_steps_is_itself(prompt: str) -> None:
    texts = schedule(prompt).texts(3)
    assert len(texts) == 3
    if "[" not in prompt:
        assert texts[0] == re.sub(r"\\(\\.|[:|])|(\\.)", _unescaped, prompt, flags=re.S)


def _unescaped(found: re.Match[str]) -> str:
    return found[1] if found[1] in (":", "|") else found[0]


HOSTILE = ("[", "(", "[a:", "[(]", "[a|b]", "<a:", ":", "|", " AND", " ", "\\", "[(a)", "a AND ")


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_prompt_takes_long_to_read(piece: str) -> None:
    prompt = (piece * 10_000)[:10_000]
    start = time.process_time()
    with contextlib.suppress(UserError):
        _ = [words.texts(20) for words, _ in parse(prompt).parts]
    with contextlib.suppress(UserError):
        parse_weights(prompt)
    assert time.process_time() - start < 1.0
