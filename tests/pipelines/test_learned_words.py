"""Learned words (textual inversion) beside a model: held to diffusers, packed in LoRAs, saved."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from tiny import WIDTH, WIDTH_2, tiny_bundle, tiny_xl, tower_of
from torch import Tensor

from latentdiff import LatentDiffusionPipeline, UserError
from latentdiff.learning.textual_inversion import add_words, save_words
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.models.text_encoders import token_spans

PROMPTS = ["a <cat>, red", "<cat>", "a red heart", "a <cat> with an arrow and a <cat> and a heart"]


def rows(count: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def states(pipe: LatentDiffusionPipeline, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        return tower_of(pipe.bundle).encode(prompts).states


def theirs(folder: Path, file: Path | None, **given: Any) -> Tensor:
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder)
    if file is not None:
        pipe.load_textual_inversion(file.parent, weight_name=file.name, **given)
    with torch.no_grad():
        return torch.cat([pipe.encode_prompt(p, "cpu", 1, False)[0] for p in PROMPTS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("count", [1, 3])
def test_states_are_those_of_diffusers(count: int, folder: Path, tmp_path: Path) -> None:
    """Of one vector and of several, of files that name the word and that do not; saved, too."""
    named, nameless = tmp_path / "learned_embeds.safetensors", tmp_path / "<cat>.safetensors"
    save_file({"<cat>": rows(count)}, named)
    save_file({"emb_params": rows(count)}, nameless)
    wanted = theirs(folder, named)
    for file in (named, nameless, tmp_path):
        pipe = LatentDiffusionPipeline.from_pretrained(folder)
        given = pipe.bundle
        plain = states(pipe, PROMPTS)
        assert pipe.load_textual_inversion(file) == ["<cat>"]
        assert float((states(pipe, PROMPTS) - wanted).abs().max()) < 1e-5
        assert float((states(pipe, PROMPTS) - plain).abs().amax((1, 2))[:2].min()) > 0.1
        assert torch.equal(states(pipe, PROMPTS)[2], plain[2])
        # The model that was there is as it was.
        assert torch.equal(states(LatentDiffusionPipeline(given), PROMPTS), plain)
    saved = pipe.bundle.save(tmp_path / "saved")
    again = LatentDiffusionPipeline.from_pretrained(saved)
    assert torch.equal(states(again, PROMPTS), states(pipe, PROMPTS))
    assert float((theirs(saved, None) - wanted).abs().max()) < 1e-5


def test_a_word_of_several_vectors_keeps_the_characters_of_its_prompt(
    folder: Path, tmp_path: Path
) -> None:
    save_file({"<cat>": rows(3)}, tmp_path / "a.safetensors")
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(tmp_path / "a.safetensors")
    assert token_spans(tower_of(pipe.bundle), "a <cat>,")[1:-1] == [(0, 1), *[(2, 7)] * 3, (7, 8)]
    cut = tower_of(pipe.bundle).tokenize(["<cat> <cat> <cat> <cat> red"]).cut
    assert cut == ["<cat> red"]


def test_a_word_learned_here_loads_beside_a_model(folder: Path, tmp_path: Path) -> None:
    bundle = add_words(tiny_bundle(), ["<mine>", "<ours>"])
    embeddings: Any = tower_of(bundle).model.get_input_embeddings()
    embeddings.rows.data.copy_(rows(2))
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    for file in save_words(bundle, ["<mine>", "<ours>"], tmp_path):
        pipe.load_textual_inversion(file)
    prompts = ["a <ours> of <mine>", "a cat"]
    assert torch.equal(states(pipe, prompts), tower_of(bundle).encode(prompts).states)
    pipe.load_textual_inversion(tmp_path / "learned_embeds-1.safetensors", token="<again>")
    again = [prompt.replace("<mine>", "<again>") for prompt in prompts]
    assert torch.equal(states(pipe, again), states(pipe, prompts))


@pytest.mark.parametrize("key", ["emb_params", "string_to_param.*", "clip_l"])
def test_words_packed_into_a_lora(key: str, folder: Path, tmp_path: Path) -> None:
    """OneTrainer's `bundle_emb`: the LoRA loads, a line names the word, which loads when asked."""
    bundle = tiny_bundle()
    for parameter in add_lora(bundle, rank=2):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator())
    plain = save_lora(lora_of(bundle), tmp_path / "plain.safetensors", layout="kohya")
    file = tmp_path / "packed.safetensors"
    save_file({**load_file(plain), f"bundle_emb.my.cat.{key}": rows(2)}, file)

    def draw(path: Path) -> Tensor:
        pipe = LatentDiffusionPipeline.from_pretrained(folder)
        pipe.load_lora(path)
        return pipe("a cat", seed=0, num_inference_steps=2, output_type="pt", progress=False).images

    wanted = draw(plain)
    with pytest.warns(UserWarning, match=r"the learned words my\.cat, which were left out"):
        assert torch.equal(draw(file), wanted)
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    assert pipe.load_textual_inversion(file) == ["my.cat"]
    ids = tower_of(pipe.bundle).tokenize(["my.cat"]).ids[0, 1:3]
    table: Any = tower_of(pipe.bundle).model.get_input_embeddings()
    assert torch.equal(table.weight[ids], rows(2))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"<cat>": torch.ones(7)}, "made for another model"),
        ({"<cat>": torch.ones(1, 2, WIDTH)}, "no rows"),
        ({"<cat>": torch.full((WIDTH,), torch.nan)}, "NaN"),
        ({"<cat>": torch.ones(WIDTH, dtype=torch.int32)}, "floating point"),
        ({"heart": torch.ones(WIDTH)}, "cannot be a learned word"),
        ({" <cat>": torch.ones(WIDTH)}, "cannot be a learned word"),
        ({"clip_g": torch.ones(WIDTH), "clip_l": torch.ones(WIDTH)}, "one CLIP text encoder"),
        ({"emb_params": torch.ones(WIDTH), "clip_l": torch.ones(WIDTH)}, "twice"),
        ({}, "empty"),
    ],
)
def test_a_bad_file_is_one_line(
    values: dict[str, Tensor], told: str, folder: Path, tmp_path: Path
) -> None:
    save_file(values, tmp_path / "a.safetensors")
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=told) as caught:
        pipe.load_textual_inversion(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_where_no_word_can_go(folder: Path, tmp_path: Path) -> None:
    save_file({"<a>": rows(1), "<b>": rows(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b.pt").write_bytes(b"PK")
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    for where, token, told in (
        ("a.safetensors", "<c>", "several words"),
        ("b.pt", None, "pickle"),
        ("c.safetensors", None, "no such file of learned words"),
    ):
        with pytest.raises(UserError, match=told):
            pipe.load_textual_inversion(tmp_path / where, token)
    with pytest.raises(UserError, match="CLIP text encoder"):
        LatentDiffusionPipeline(tiny_bundle(tower="t5")).load_textual_inversion(tmp_path / "a")


def test_words_of_stable_diffusion_xl(tmp_path: Path) -> None:
    """Rows for each encoder, as A1111 and ComfyUI have them: held to diffusers, which is given them
    apart. A refiner takes those of its one; of another model they are one line."""
    folder = tiny_xl().save(tmp_path / "model")
    sides = {"clip_l": rows(2), "clip_g": torch.cat([rows(2), rows(2)[:, : WIDTH_2 - WIDTH]], 1)}
    save_file(sides, file := tmp_path / "<cat>.safetensors")
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    prompts = ["a <cat>, red", "a red heart"]
    plain = pipe.bundle.conditioner.encode(prompts, (16, 16)).condition
    assert pipe.load_textual_inversion(file) == ["<cat>"]
    their: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    for suffix, value in (("", sides["clip_l"]), ("_2", sides["clip_g"])):
        parts = {"text_encoder": getattr(their, f"text_encoder{suffix}")}
        parts |= {"tokenizer": getattr(their, f"tokenizer{suffix}")}
        their.load_textual_inversion({"<cat>": value}, token="<cat>", **parts)
    with torch.no_grad():
        wanted = [their.encode_prompt(p, do_classifier_free_guidance=False) for p in prompts]
        got = pipe.bundle.conditioner.encode(prompts, (16, 16)).condition
    for name, at in (("states", 0), ("pooled", 2)):
        ours, theirs = got.given()[name], torch.cat([each[at] for each in wanted])
        assert (ours - theirs).abs().max() < 1e-5, name
        assert (ours[0] - plain.given()[name][0]).abs().max() > 0.1
        assert (ours[1] - plain.given()[name][1]).abs().max() < 1e-5

    old = folder / "text_encoder_2" / "config.json"  # the end mark of published configs
    old.write_text(json.dumps(json.loads(old.read_text()) | {"eos_token_id": 2}))
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.load_textual_inversion(file)
    saved: Any = StableDiffusionXLPipeline.from_pretrained(pipe.bundle.save(tmp_path / "saved"))
    with torch.no_grad():
        _, _, pooled, _ = saved.encode_prompt(prompts[0], do_classifier_free_guidance=False)
    assert (pooled[0] - got.given()["pooled"][0]).abs().max() < 1e-5

    refiner = LatentDiffusionPipeline(tiny_xl(refiner=True))
    assert refiner.load_textual_inversion(file) == ["<cat>"]
    with pytest.raises(UserError, match="not of a learned word for one CLIP text encoder"):
        LatentDiffusionPipeline(tiny_bundle()).load_textual_inversion(file)
    for values, told in (
        ({"clip_l": rows(1)}, "no rows of '<dog>' for the text_encoder_2"),
        ({"emb_params": rows(1)}, "rows for each text encoder, clip_l and clip_g"),
        ({"clip_l": rows(1), "clip_g": rows(1)}, "its rows are 16 wide, the text encoder's 24"),
    ):
        save_file(values, tmp_path / "<dog>.safetensors")
        with pytest.raises(UserError, match=told):
            pipe.load_textual_inversion(tmp_path / "<dog>.safetensors")
