"""Pictures that say how they were drawn: ours are drawn again to the bit, others' are read."""

import functools
import hashlib
import io
import json
import tempfile
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tiny import tiny_bundle, tiny_control

from latentdiff import LatentDiffusionPipeline
from latentdiff.cli import main
from latentdiff.formats.picture_text import OURS, THEIRS, Recipe, a1111_text, recipe_of, texts_of
from latentdiff.lora import add_lora, lora_of, save_lora
from latentdiff.pictures import encode_png

HOSTILE = 'a "cat", \\n Steps: 3,\nNegative prompt: x\n(b:1.2) [c] 猫 \x1b[31m'
RUNS = [
    ["a red heart", "--seed", "7"],
    [HOSTILE, "--seed", str(2**64 - 1), "--negative", HOSTILE, "--guidance-scale", "2.5"],
    ["(a:1.3) cat", "--weights", "--steps", "3", "--first", "5", "--interval", "0.2,5"],
    ["a cat", "--also", "a hat:0.5", "--also", "rain:-0.25", "--solver", "euler-a"],
    ["a cat", "--guide", "threshold:0.9", "--timetable", "karras", "--size", "24"],
    ["a cat", "--guidance", "apg", "--height", "16", "--width", "24"],
    ["a cat", "--engine", "packed"],
    ["[a:the:1] (cat:1.2) AND a hat :0.5", "--syntax", "a1111", "--clip-skip", "1"],
    ["@@story.txt", "--attention", "eager", "--region", "a hat:2@box:0,0,8,8"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle().save(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("run", RUNS)
def test_a_picture_is_drawn_again_to_the_bit(
    run: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [] if "--steps" in run else ["--steps", "2"]
    rest = ["--model", str(model), "-o", str(tmp_path)]
    assert main(["generate", *run, *steps, *rest]) == 0
    (first,) = tmp_path.glob("*.png")
    assert main(["generate", "--from", str(first), *rest]) == 0
    again = next(path for path in tmp_path.glob("*.png") if path != first)
    assert again.read_bytes() == first.read_bytes()
    assert main(["generate", "--from", str(first), "--seed", "3", *rest]) == 0
    changed = sorted(tmp_path.glob("*.png"))[-1]
    assert Image.open(changed).tobytes() != Image.open(first).tobytes()
    capsys.readouterr()
    assert main(["show", str(first)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["show", "--json", str(first)]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == run[0].replace("@@", "@")


PIECES = ["a cat", ", ", '"', "'", "\n", "Steps: 20, Sampler: x", "\nNegative prompt: ", "\\", "@",
          "--seed", "(b:1.2)", "[c]", "<lora:d:1>", "AND", "BREAK", "{}", "%s", "$(e)", "猫", "🎨",
          "\0", "\r", "\x1b[2J", "\u202e", "0", ":", ":0.5", "box:1"]  # fmt: skip
WORDS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=6).map("".join)
CHOICES = {
    "steps": st.integers(1, 3),
    "seed": st.integers(0, 2**64 - 1),
    "first": st.integers(0, 2**40),
    "guidance": st.sampled_from(["cfg", "apg"]),
    "guidance-scale": st.floats(0, 9),
    "interval": st.sampled_from(["0.1,9", "0,inf"]),
    "negative": WORDS,
    "also": st.tuples(WORDS, st.floats(-2, 2)).map(lambda pair: f"{pair[0]}:{pair[1]:.3f}"),
    "region": WORDS.map(lambda words: f"{words}:0.7@box:0,0,9,5"),
    "solver": st.sampled_from(["ddim", "euler-a", "unipc", "heun", "DPM++ 2M Karras"]),
    "timetable": st.sampled_from(["trailing", "Exponential", "linspace"]),
    "height": st.sampled_from([8, 16, 24]),
    "width": st.sampled_from([8, 16, 24]),
    "guide": st.sampled_from(["pag:2", "seg:1.5", "threshold:0.9"]),
    "clip-skip": st.just(1),
    "syntax": st.sampled_from(["plain", "a1111"]),
    "variation-strength": st.floats(0.1, 1),
    "engine": st.sampled_from(["eager", "packed"]),
    "attention": st.sampled_from(["eager", "sdpa"]),
}


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_whatever_the_settings_the_same_bytes_are_drawn_again(
    count: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = functools.cache(LatentDiffusionPipeline.from_pretrained)
    monkeypatch.setattr(LatentDiffusionPipeline, "from_pretrained", load)
    drawn = 0

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(WORDS, st.fixed_dictionaries({}, optional=CHOICES), st.booleans(), st.booleans())
    def check(prompt: str, chosen: dict[str, object], weights: bool, long: bool) -> None:
        nonlocal drawn
        options = [f"--{name}={value}" for name, value in ({"steps": 1} | chosen).items()]
        options += ["--weights"] * weights + ["--long"] * long
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            rest = ["--model", str(model), "-o", place]
            word = f"@{prompt}" if prompt.startswith("@") else prompt
            assume(main(["generate", *options, *rest, "--", word]) == 0)
            (first,) = Path(place).iterdir()
            kept = first.read_bytes()
            assert json.loads(texts_of(kept)[OURS])["prompt"] == prompt
            assert main(["generate", "--from", str(first), *rest]) == 0
            (again,) = (path for path in Path(place).iterdir() if path != first)
            assert again.read_bytes() == kept
            drawn += 1

    check()
    assert drawn >= count * 0.9


def written(folder: Path, texts: dict[str, str]) -> str:
    path = folder / f"{len(list(folder.iterdir()))}.png"
    path.write_bytes(encode_png(Image.new("RGB", (4, 4)), texts))
    return f"{path}"


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads(texts_of(path.read_bytes())[OURS])


VARIED = ["--variation-seed", "4", "--variation-strength", "0.5"]


@pytest.mark.parametrize(("how", "index"), [(["--first", "3"], 5), (VARIED, 0)])
def test_a_grid_is_drawn_again_and_a_picture_of_it_by_its_index(
    how: list[str], index: int, model: Path, tmp_path: Path
) -> None:
    rest = ["--model", str(model), "--steps", "2"]
    once, again = tmp_path / "once", tmp_path / "again"
    many = ["generate", "a cat", "@@home", "-n", "2", "--grid", "--seed", "7", *how]
    assert main([*many, *rest, "-o", str(once)]) == 0
    first = {path.name: path.read_bytes() for path in once.iterdir()}
    assert len(first) == 5
    grid = once / "00000-7-grid.png"
    assert settings_of(grid)["prompt"] == ["a cat", "a cat", "@home", "@home"]
    assert main(["generate", "--from", str(grid), *rest, "-o", str(again)]) == 0
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first
    assert settings_of(once / "00002-7.png")["index"] == index
    alone = tmp_path / "alone"
    assert main(["generate", "--from", str(once / "00002-7.png"), *rest, "-o", str(alone)]) == 0
    (one,) = alone.iterdir()
    assert texts_of(one.read_bytes()) == texts_of(first["00002-7.png"])
    pixels = [np.asarray(Image.open(path)).astype(int) for path in (one, once / "00002-7.png")]
    assert abs(pixels[0] - pixels[1]).max() <= 1  # another batch may round otherwise


def test_what_goes_with_an_option_that_is_given_anew_is_not_taken_over(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--model", str(model), "-o", str(tmp_path)]
    kept = ["--solver", "dpmpp-2m", "--timetable", "karras", "--rescale", "0.5", "--height", "24"]
    assert main(["generate", "a cat", "--steps", "2", "--guidance-scale", "3", *kept, *rest]) == 0
    (first,) = tmp_path.glob("*.png")
    for changed, expected in [
        (["--solver", "heun"], {"solver": "heun", "timetable": "trailing", "guidance_scale": 3}),
        (["--solver", "heun", "--timetable", "karras"], {"solver": "heun", "timetable": "karras"}),
        (["--timetable", "exponential"], {"solver": "dpmpp-2m", "timetable": "exponential"}),
        (["--guidance", "cfg++"], {"guidance": "cfg++", "guidance_scale": 0.6, "height": 24}),
        (["--guidance", "apg"], {"guidance_scale": 4, "guidance_rescale": 0}),
        (["--size", "16"], {"height": 16, "width": 16}),
    ]:
        assert main(["generate", "--from", str(first), *changed, *rest]) == 0
        told = settings_of(sorted(tmp_path.glob("*.png"))[-1])
        assert {name: told[name] for name in expected} == expected
    clash = ["--size", "16", "--height", "24"]
    assert main(["generate", "--from", str(first), *clash, *rest]) == 2
    assert "--size is height and width" in capsys.readouterr().err


def test_a_file_that_has_changed_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoRA, a ControlNet's folder, its picture and a region's mask, each by its fingerprint."""
    bundle = tiny_bundle()
    for parameter in add_lora(bundle, rank=2):
        parameter.data.fill_(0.5)
    lora = save_lora(lora_of(bundle), tmp_path / "cats.safetensors")
    tiny_control().save_pretrained(tmp_path / "net")
    for name, colour in (("mask.png", 255), ("photo.png", 90)):
        Image.new("L", (16, 16), colour).save(tmp_path / name)
    control, mask = f"{tmp_path / 'net'}:{tmp_path / 'photo.png'}:0.5", tmp_path / "mask.png"
    files = ["--lora", f"{lora}:0.8", "--control", control, "--region", f"a hat@{mask}"]
    rest = ["--model", str(model), *files, "-o", str(tmp_path / "out")]
    assert main(["generate", "a cat", "--steps", "1", "--seed", "1", *rest]) == 0
    (first,) = (tmp_path / "out").iterdir()
    kept = settings_of(first)["hashes"]
    assert [name for name, _ in kept] == ["cats.safetensors", "net", "photo.png", "mask.png"]
    assert kept[0][1] == hashlib.sha256(lora.read_bytes()).hexdigest()[:16]
    capsys.readouterr()
    again = ["generate", "--from", str(first), *rest]
    assert main(again) == 0
    assert "has changed" not in capsys.readouterr().err
    for changed in (lora, tmp_path / "net" / "config.json", tmp_path / "photo.png", mask):
        before = changed.read_bytes()
        changed.write_bytes(before + b" ")  # after its end, where each format's readers stop
        named = changed if changed.parent == tmp_path else changed.parent
        main(again)
        told = [
            line for line in capsys.readouterr().err.splitlines() if "has changed since" in line
        ]
        assert len(told) == 1
        assert f"{named} has changed since {first} was drawn" in told[0]
        changed.write_bytes(before)


HOSTILE_NAME = "x; rm -rf ~"


def test_files_that_only_the_picture_names_are_not_opened(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundled: dict[str, object] = {"prompt": "a", "model": "emoji128"}
    for more, told in [
        ({"model": "dreams.safetensors"}, "--model dreams.safetensors"),
        ({"model": str(model)}, f"--model {model}"),
        ({"loras": [["cats.safetensors", 0.8]]}, "--lora cats.safetensors:0.8"),
        ({"vae": HOSTILE_NAME}, f"--vae '{HOSTILE_NAME}'"),
        ({"embeddings": ["a", "b"]}, "--embedding a --embedding b"),
        (
            {"edits": ["pag:2", f"autoguidance:2:{model}"], "vae": "v"},
            f"--vae v --guide pag:2 --guide autoguidance:2:{model}",
        ),
        ({"edits": ["clip:2:/dev/zero"]}, "--guide clip:2:/dev/zero"),
        ({"regions": ["a@box:0,0,1,1", "b@x.png"]}, "--region a@box:0,0,1,1 --region b@x.png"),
    ]:
        picture = written(tmp_path, {OURS: json.dumps(bundled | more)})
        assert main(["generate", "--from", picture, "-o", str(tmp_path / "out")]) == 2
        ending = f"it keeps no paths: add {told}, with their paths here."
        assert capsys.readouterr().err.strip().endswith(ending)
    lora = written(tmp_path, {THEIRS: f"a <lora:cats:0.5>\n{TEXT.splitlines()[-1]}"})
    for more, told in [
        ([], "<lora:cats:0.5>: there is no such file among those of --lora"),
        (["--lora", "cats.safetensors"], "it keeps no paths: add --model v1-5, with"),
    ]:
        assert main(["generate", "--from", lora, *more, "-o", str(tmp_path / "out")]) == 2
        assert told in capsys.readouterr().err
    (tmp_path / "secret.txt").write_text("secret")
    prompt = f"@{tmp_path / 'secret.txt'}"
    picture = written(tmp_path, {OURS: json.dumps(bundled | {"prompt": prompt, "seed": 1})})
    run = ["generate", "--from", picture, "--steps", "1", "--guidance-scale", "1"]
    assert main([*run, "-o", str(tmp_path / "out")]) == 0
    (drawn,) = (tmp_path / "out").iterdir()
    assert settings_of(drawn)["prompt"] == prompt


@pytest.mark.parametrize(
    "damaged",
    [
        {"prompt": 3}, {"prompt": ["a", 3]}, {"num_inference_steps": "many"}, {"seed": -1},
        {"num_inference_steps": 0}, {"seed": True}, {"guidance_interval": 5}, {"also": 3},
        {"guidance_interval": [float("nan"), 1]}, {"also": [["a"]]}, {"edits": "pag:2"},
        {"edits": ["magic"]}, {"loras": [["a"]]}, {"guidance_scale": {}}, {"index": [0]},
        {"prompt": ["a", "b"], "index": [0, 5]}, {"engine": "magic"}, {"height": 2.5},
        {"prompt": ["a", "b", "a", "b"], "num_images_per_prompt": 2}, {"guidance_scale": 1e300},
    ],
    ids=str,
)  # fmt: skip
def test_damaged_settings_are_one_line(
    damaged: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = written(tmp_path, {OURS: json.dumps({"prompt": "a"} | damaged)})
    assert main(["generate", "--from", picture, "-o", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {picture}: its settings are damaged: ")
    assert main(["show", picture]) == 0


def test_what_cannot_be_drawn_again_and_what_is_not_taken_over_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--model", str(model), "-o", str(tmp_path / "out")]
    assert main(["grid", "a cat", "--x", "steps=1,2", "--guide", "pag:2", *rest]) == 0
    assert main(["interpolate", "a cat", "a dog", "-n", "2", "--steps", "1", *rest]) == 0
    grid, way, _ = sorted((tmp_path / "out").iterdir())
    told = settings_of(grid)
    assert (told["edits"], told["solver"], told["x"]) == (["pag:2"], "dpmpp-2m", "steps=1,2")
    (plain := tmp_path / "plain.png").write_bytes(encode_png(Image.new("RGB", (4, 4))))
    edited = {"prompt": "a", "edit": "SDEdit"}
    for picture, line in [
        (str(grid), "is a grid of 'a cat' under settings that vary: latentdiff show tells the"),
        (str(way), "is between ['a cat', 'a dog']: latentdiff show tells the settings."),
        (written(tmp_path, {OURS: json.dumps(edited)}), "was drawn with edits, SDEdit: latent"),
        (written(tmp_path, {OURS: json.dumps(edited | {"picture": "p.png"})}), "made out of p.png"),
        (str(plain), "says nothing of how it was drawn."),
        (str(tmp_path / "none.png"), "No such file or directory"),
    ]:
        capsys.readouterr()
        assert main(["generate", "--from", picture, *rest]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert line in said
    asked = "Denoising strength: 0.5, ENSD: 2, " + TEXT.splitlines()[-1]
    picture = written(tmp_path, {THEIRS: f"a cat\n{asked}"})
    assert main(["generate", "--from", picture, "--size", "16", "--steps", "1", *rest]) == 0
    said = capsys.readouterr().err
    assert "not taken over from A1111: ENSD, strength" in said
    ours = written(tmp_path, {OURS: json.dumps({"prompt": "a", "magic": 3, "solver": "spell"})})
    assert main(["generate", "--from", ours, "--steps", "1", *rest]) == 0
    said = capsys.readouterr().err
    assert "not taken over from latentdiff: magic, unknown solver 'spell'" in said


def test_prompts_come_from_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog\n", "utf-8")
    rest = ["--model", str(model), "-o", str(tmp_path), "--steps", "1", "--seed", "1"]
    assert main(["generate", f"@{tmp_path / 'prompts.txt'}", "a bird", *rest]) == 0
    texts = [texts_of(path.read_bytes()) for path in sorted(tmp_path.glob("*.png"))]
    assert [json.loads(text[OURS])["prompt"] for text in texts] == ["a cat", "a dog", "a bird"]
    assert main(["generate", f"@{tmp_path / 'none.txt'}", *rest]) == 2


A1111 = {
    "prompt": "a cat, (hat:1.2)",
    "negative_prompt": "blurry",
    "num_inference_steps": 20,
    "solver": "DPM++ 2M",
    "timetable": "Karras",
    "guidance_scale": 7.5,
    "seed": 123,
    "width": 512,
    "height": 768,
    "model": "v1-5",
}
TEXT = (
    "a cat, (hat:1.2)\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M, "
    "Schedule type: Karras, CFG scale: 7.5, Seed: 123, Size: 512x768, "
    "Model hash: abc, Model: v1-5, Version: v1.9.0"
)
NODES = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 5, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal",
        "denoise": 1, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0],
        "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "a", "model": ["4", 0]}},
}  # fmt: skip
CUSTOM = {
    "1": {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["2", 0], "guider": ["3", 0], "sampler": ["4", 0], "sigmas": ["5", 0]}},
    "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 9}},
    "3": {"class_type": "BasicGuider", "inputs": {"conditioning": ["6", 0]}},
    "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}},
    "5": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 4}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog"}},
}  # fmt: skip
INVOKE = {"positive_prompt": "a cat", "negative_prompt": "", "seed": 4, "steps": 30,
          "cfg_scale": 7.5, "scheduler": "euler_a", "width": 512, "height": 512,
          "model": {"name": "sd-1"}, "app_version": "5.0", "loras": [{"weight": 1}]}  # fmt: skip
OLD = {"image": {"prompt": [{"prompt": "a cat", "weight": 1}], "seed": 3, "steps": 50,
                 "cfg_scale": 7.5, "sampler": "k_lms", "width": 512, "height": 512}}  # fmt: skip
PLAIN = {"prompt": "a cat", "seed": 5, "num_inference_steps": 20}
FOREIGN: list[tuple[dict[str, str], Recipe | None]] = [
    ({THEIRS: TEXT}, Recipe("A1111", A1111)),
    ({THEIRS: TEXT + ", ENSD: 31337, Hires upscale: 2"},
     Recipe("A1111", A1111, ["ENSD", "Hires upscale"])),
    ({THEIRS: TEXT.replace("v1-5", '"a, b: \\"c\\""')},
     Recipe("A1111", A1111 | {"model": 'a, b: "c"'})),
    ({THEIRS: TEXT.replace("\nNegative prompt: blurry", "")},
     Recipe("A1111", {k: v for k, v in A1111.items() if k != "negative_prompt"})),
    ({THEIRS: "two\nlines" + TEXT.removeprefix("a cat, (hat:1.2)")},
     Recipe("A1111", A1111 | {"prompt": "two\nlines"})),
    ({THEIRS: "only words"}, Recipe("A1111", {"prompt": "only words"})),
    ({THEIRS: TEXT.replace("v1-5", '"C:\\models, \\x"')},
     Recipe("A1111", A1111 | {"model": "C:models, x"})),
    ({THEIRS: TEXT + ", Denoising strength: 0.75, Clip skip: 2"},
     Recipe("A1111", A1111 | {"strength": 0.75, "clip_skip": 1})),
    ({"prompt": json.dumps(NODES), "workflow": "{}"},
     Recipe("ComfyUI", {"seed": 5, "num_inference_steps": 20, "guidance_scale": 8.0,
                        "solver": "euler", "timetable": "normal", "width": 512, "height": 640,
                        "model": "v1-5.safetensors", "prompt": "a cat",
                        "negative_prompt": "blurry"}, ["LoraLoader"])),
    ({"prompt": json.dumps(CUSTOM)},
     Recipe("ComfyUI", {"seed": 9, "num_inference_steps": 4, "solver": "dpmpp_2m",
                        "timetable": "simple", "prompt": "a dog", "guidance_scale": 1.0})),
    ({"invokeai_metadata": json.dumps(INVOKE)},
     Recipe("InvokeAI", {"prompt": "a cat", "seed": 4, "num_inference_steps": 30,
                         "guidance_scale": 7.5, "solver": "euler_a", "width": 512, "height": 512,
                         "model": "sd-1"}, ["loras"])),
    ({"sd-metadata": json.dumps(OLD)},
     Recipe("InvokeAI", {"prompt": "a cat", "seed": 3, "num_inference_steps": 50,
                         "guidance_scale": 7.5, "solver": "k_lms", "width": 512, "height": 512})),
    ({"prompt": json.dumps(NODES | {"3": {"class_type": "KSampler", "inputs":
      NODES["3"]["inputs"] | {"denoise": 0.5, "model": ["4", 0]}}})},
     Recipe("ComfyUI", {"seed": 5, "num_inference_steps": 20, "guidance_scale": 8.0,
                        "solver": "euler", "timetable": "normal", "width": 512, "height": 640,
                        "model": "v1-5.safetensors", "prompt": "a cat",
                        "negative_prompt": "blurry"}, ["denoise"])),
    ({"sd-metadata": json.dumps({"image": OLD["image"] | {"seed": "x", "hires_fix": True}})},
     Recipe("InvokeAI", {"prompt": "a cat", "num_inference_steps": 50, "guidance_scale": 7.5,
                         "solver": "k_lms", "width": 512, "height": 512}, ["seed", "hires_fix"])),
    ({OURS: json.dumps(PLAIN), THEIRS: TEXT}, Recipe("latentdiff", PLAIN)),
    ({"Comment": "made by hand"}, None),
    ({"prompt": '{"1": {"class_type": "KSampler", "inputs": {"a": ["1", 0], "seed": "x"}}}'}, None),
    ({"prompt": "[" * 100_000, "invokeai_metadata": "3", "sd-metadata": "{}", OURS: "[]"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "recipe"), FOREIGN)
def test_what_other_programs_write_is_read(texts: dict[str, str], recipe: Recipe | None) -> None:
    assert recipe_of(texts) == recipe
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for keyword, text in texts.items():
        info.add_itxt(keyword, text, zip=True)
    Image.new("RGB", (2, 2)).save(file, "PNG", pnginfo=info)
    assert recipe_of(texts_of(file.getvalue())) == recipe


def test_a_jpeg_keeps_it_in_its_comment(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + TEXT.encode("utf-16-be")
    for name in ("a.jpg", "a.webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, exif=exif)
        assert recipe_of(texts_of((tmp_path / name).read_bytes())) == Recipe("A1111", A1111)


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


@pytest.mark.parametrize(
    "inside",
    [
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 2**27)),
        chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"[" * 2**27)),
        chunk(b"zTXt", b"parameters\0\0no zlib"),
        chunk(b"iTXt", b"parameters"),
        b"\xff\xff\xff\xfftEXtparameters\0a cat\nSteps: 3",
        b"\0\0\0",
    ],
)
def test_hostile_chunks_are_no_recipe_and_take_no_memory(inside: bytes) -> None:
    plain = encode_png(Image.new("RGB", (2, 2)))
    assert texts_of(plain[:33] + inside + plain[33:]) == {}


@pytest.mark.parametrize(
    "line",
    [
        "x" + " " * 10**5,
        "a b" * 10**5,
        'a:"' * 20_000,
        'a:"\\",' * 20_000,
    ],
)
def test_hostile_words_are_read_in_time_of_their_length(line: str) -> None:
    began = time.process_time()
    assert recipe_of({THEIRS: f"{line}\n{line}"}) is not None
    assert time.process_time() - began < 5


def test_many_chunks_are_inflated_only_where_they_are_read_and_once() -> None:
    bomb = zlib.compress(b"a" * (4 * 2**20))
    chunks = [chunk(b"zTXt", b"parameters\0\0" + zlib.compress(TEXT.encode()))]
    for number in range(5000):
        chunks += [chunk(b"zTXt", b"%d\0\0" % number + bomb)]
        chunks += [chunk(b"zTXt", b"parameters\0\0" + bomb)]
    plain = encode_png(Image.new("RGB", (2, 2)))
    data = plain[:33] + b"".join(chunks) + plain[33:]
    began = time.process_time()
    assert texts_of(data) == {THEIRS: TEXT}
    assert time.process_time() - began < 5


@given(
    st.text(max_size=80),
    st.text(max_size=40),
    st.integers(0, 2**64 - 1),
    st.integers(1, 1000),
    st.floats(0, 30, allow_nan=False),
)
def test_our_own_words_for_a1111_are_read_back(
    prompt: str, negative: str, seed: int, steps: int, scale: float
) -> None:
    settings: dict[str, Any] = {
        "prompt": prompt, "negative_prompt": negative, "seed": seed, "num_inference_steps": steps,
        "guidance_scale": scale, "solver": "dpmpp-2m", "width": 64, "height": 32,
        "prompt_weights": True, "version": "1",
    }  # fmt: skip
    recipe = recipe_of({THEIRS: a1111_text(settings)})
    assert recipe is not None
    for name in ("seed", "num_inference_steps", "guidance_scale", "solver", "width", "height"):
        assert recipe.settings[name] == settings[name]
    if "Negative prompt:" not in prompt + negative and "\n" not in prompt + negative:
        assert recipe.settings["prompt"] == prompt.strip()
