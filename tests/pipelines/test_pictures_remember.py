"""Pictures that say how they were drawn: ours are drawn again to the bit, others' are read."""

import io
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tiny import tiny_bundle

from latentdiff.cli import main
from latentdiff.formats.picture_text import OURS, THEIRS, Recipe, a1111_text, recipe_of, texts_of
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
    assert json.loads(capsys.readouterr().out)["prompt"] == run[0]


def test_what_is_missing_to_draw_it_again_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(**settings: object) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        path.write_bytes(encode_png(Image.new("RGB", (4, 4)), {OURS: json.dumps(settings)}))
        return str(path)

    other = written(prompt="a", model="dreams.safetensors")
    lora = written(prompt="a", model="emoji64", loras=[["cats.safetensors", 0.8]])
    edited = written(prompt="a", edit="SDEdit", picture="photo.png")
    plain = tmp_path / "plain.png"
    plain.write_bytes(encode_png(Image.new("RGB", (4, 4))))
    for picture, told in [
        (other, "was drawn with dreams.safetensors: name a model, --model PATH."),
        (lora, "was drawn with LoRAs: name them by their paths, --lora cats.safetensors:0.8."),
        (edited, "was made out of photo.png: latentdiff show tells how."),
        (str(plain), "says nothing of how it was drawn."),
        (str(tmp_path / "none.png"), "No such file or directory"),
    ]:
        assert main(["generate", "--from", picture, "-o", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.strip().endswith(told)
    assert not (tmp_path / "out").exists()


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
    ({"prompt": json.dumps(NODES), "workflow": "{}"},
     Recipe("ComfyUI", {"seed": 5, "num_inference_steps": 20, "guidance_scale": 8.0,
                        "solver": "euler", "timetable": "normal", "width": 512, "height": 640,
                        "model": "v1-5.safetensors", "prompt": "a cat",
                        "negative_prompt": "blurry"}, ["LoraLoader"])),
    ({"prompt": json.dumps(CUSTOM)},
     Recipe("ComfyUI", {"seed": 9, "num_inference_steps": 4, "solver": "dpmpp_2m",
                        "timetable": "simple", "prompt": "a dog"})),
    ({"invokeai_metadata": json.dumps(INVOKE)},
     Recipe("InvokeAI", {"prompt": "a cat", "seed": 4, "num_inference_steps": 30,
                         "guidance_scale": 7.5, "solver": "euler_a", "width": 512, "height": 512,
                         "model": "sd-1"}, ["loras"])),
    ({"sd-metadata": json.dumps(OLD)},
     Recipe("InvokeAI", {"prompt": "a cat", "seed": 3, "num_inference_steps": 50,
                         "guidance_scale": 7.5, "solver": "k_lms", "width": 512, "height": 512})),
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
