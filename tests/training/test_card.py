"""The card of a trained model, and the line of a push that fails."""

import json
import platform
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import tiny_bundle

from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.data.examples import Example
from latentdiff.errors import UserError
from latentdiff.files import make_folder
from latentdiff.formats.location import public_name
from latentdiff.learning.card import Outcome, card, push, share
from latentdiff.learning.config import CardConfig, OptimConfig, RunConfig
from latentdiff.learning.finetune_config import FinetuneConfig, LoraConfig, PicturesConfig
from latentdiff.learning.methods import make_trainable
from latentdiff.learning.records import Records
from latentdiff.learning.results import save_outcome


def a_run(folder: Path, **about: str) -> tuple[Outcome, RunConfig]:
    """A finished LoRA run: losses 1.0 at first, 0.25 at last, two grids."""
    config = RunConfig(
        out=folder / "cats", seed=5, optim=OptimConfig(steps=40, lr=2e-3), card=CardConfig(**about)
    )
    (config.out / "pictures").mkdir(parents=True)
    for step, colour in ((0, "red"), (40, "blue")):
        grid = Image.new("RGB", (4, 4), colour)
        grid.save(config.out / "pictures" / f"samples-{step:08d}.png")
    losses = [1.0] * 2 + [0.5] * 16 + [0.25] * 2
    lines = [json.dumps({"step": n, "loss": loss, "lr": 1}) for n, loss in enumerate(losses)]
    (config.out / "log.jsonl").write_text("\n".join([*lines, '{"step": 40, "loss": null}\n']))
    captions = ["a red cat", "a blue cat\nasleep", "a cat", "a cat: yellow"]
    pictures = [Example(Path(f"{n}.png"), (caption,), {}) for n, caption in enumerate(captions)]
    outcome = Outcome(config.out, "lora", None, [*pictures, pictures[0]], folder / "my cats")
    return outcome, config


def test_a_card_says_what_it_learned_from_and_how(tmp_path: Path) -> None:
    outcome, config = a_run(tmp_path, licence="cc-by-4.0")
    (line,) = share(outcome, config)
    assert line == f"wrote {tmp_path / 'cats' / 'README.md'}"
    text = (tmp_path / "cats" / "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    told = yaml.safe_load(head)
    assert (told["license"], told["library_name"]) == ("cc-by-4.0", "diffusers")
    assert "lora" in told["tags"]
    assert "5 pictures of the folder `my cats` with 4 different captions" in body
    assert "“a red cat”; “a blue cat asleep”; “a cat” …" in body
    assert "| loss, mean of the first and the last tenth | 1.0000, 0.2500 |" in body
    assert "| steps | 40 |" in body
    assert "| learning rate | 0.002 |" in body
    assert "cc-by-4.0" in body
    assert "latentdiff generate 'a red cat' --lora cats\n" in body
    assert Image.open(tmp_path / "cats" / "samples.png").getpixel((0, 0)) == (0, 0, 255)
    assert str(tmp_path) not in text
    assert not list((tmp_path / "cats").glob(".*"))


def test_the_use_of_a_card_is_typed_where_the_run_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome, config = a_run(Path("runs"))
    assert "--lora runs/cats\n" in card(outcome, config, False, ["latentdiff"])


def test_what_diffusers_does_not_read_is_not_offered_to_it(tmp_path: Path) -> None:
    outcome, config = a_run(tmp_path)
    assert "pipe.load_lora_weights(" in card(outcome, config, False, ["latentdiff"])
    text = card(replace(outcome, in_diffusers=False), config, False, ["latentdiff"])
    assert "library_name: latentdiff" in text
    assert "--lora cats\n" in text
    assert "pipe." not in text


def test_the_command_of_a_card_can_be_typed_and_tells_no_place(tmp_path: Path) -> None:
    outcome, config = a_run(tmp_path)
    # fmt: off
    command = [
        "/home/someone/training/finetune.py", "--data", "/home/someone/my cats", "--out=~someone/x",
        'prior.prompts=["@/home/someone/p.txt","a dog"]', "data.root=https://t:k@host/{0..9}.tar",
        "--config", "training/configs/a.yaml", "--model", "owner/name", "../someone/b",
    ]
    # fmt: on
    text = card(outcome, config, False, command)
    shown = "finetune.py --data 'my cats' --out=x 'prior.prompts=[\"@p.txt\",\"a dog\"]' "
    shown += "'data.root={0..9}.tar' --config training/configs/a.yaml --model owner/name b"
    assert f"\naccelerate launch {shown}\n" in text
    assert "someone" not in text
    assert "samples.png" not in text
    assert "Not declared" in text
    for program in ("/home/someone/bin/latentdiff", "/home/someone/latentdiff/__main__.py"):
        text = card(outcome, config, False, [program, "finetune", "--data=/home/someone/cats"])
        assert "```sh\nlatentdiff finetune --data=cats\n```" in text


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("owner/name", "owner/name"),
        ("training/configs/a.yaml", "training/configs/a.yaml"),
        ("data/{0..9}.tar", "data/{0..9}.tar"),
        ("/home/someone/model", "model"),
        ("/home/someone/model/", "model"),
        ("~someone/model", "model"),
        ("../someone/model", "model"),
        ("here/../../someone/model", "model"),
        ("C:\\Users\\someone\\model", "model"),
        ("C:/Users/someone/model", "model"),
        ("\\\\someone\\share\\model", "model"),
        ("file:/home/someone/model", "model"),
        ("file:///home/someone/model", "model"),
        ("file:~/someone/model", "model"),
        ("https://someone:key@host/someone/model?token=key#someone", "model"),
        ("https://someone:key@host/{0..9}.tar", "{0..9}.tar"),
        ("https://someone:key@host?token=key", "an address"),
        ("http://[someone/model", "model"),
    ],
)
def test_a_public_name_tells_no_place_and_no_secret(where: str, told: str) -> None:
    assert public_name(where) == told


def test_the_command_of_a_card_hides_paths_inside_mappings(tmp_path: Path) -> None:
    outcome, config = a_run(tmp_path)
    word = "data={root: /home/someone/a, more: ['https://someone@h/x.tar?k=1', ~someone/c]}"
    text = card(outcome, config, False, ["finetune.py", word])
    assert "'data={root: a, more: ['\"'\"'x.tar'\"'\"', c]}'" in text
    assert "someone" not in text


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_command_that_a_run_ends_with_can_be_typed(
    tmp_path: Path, method: Literal["lora", "full"]
) -> None:
    out, data = tmp_path / "my cats", PicturesConfig(root=tmp_path / "pictures")
    config = FinetuneConfig(method=method, model="a model", data=data, out=out)
    bundle = make_trainable(tiny_bundle(), config)
    lines = save_outcome(bundle, config, [])
    (command,) = (line for line in lines if line.startswith("latentdiff generate"))
    lora = ["--lora", f"{out}/pytorch_lora_weights.safetensors", "--model", "a model"]
    assert shlex.split(command)[3:] == (lora if method == "lora" else ["--model", f"{out}/model"])


@pytest.mark.parametrize(("layout", "beginning"), [("diffusers", "unet."), ("kohya", "lora_unet_")])
def test_a_fine_tune_writes_either_layout(
    tmp_path: Path, layout: Literal["diffusers", "kohya"], beginning: str
) -> None:
    data = PicturesConfig(root=tmp_path / "pictures")
    own = LoraConfig(layout=layout)
    config = FinetuneConfig(
        method="lora", model="a model", data=data, out=tmp_path / "out", lora=own
    )
    save_outcome(make_trainable(tiny_bundle(), config), config, [])
    names = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith(beginning) for name in names)


def test_a_base_model_of_the_hub_is_named_for_it(tmp_path: Path) -> None:
    outcome, config = a_run(tmp_path)
    folder = tiny_bundle().save(tmp_path / "model")
    model = Outcome(folder, "model", "owner/base", outcome.pictures, outcome.root)
    told = yaml.safe_load(card(model, config, True, ["latentdiff"]).split("---\n")[1])
    assert told["base_model"] == "owner/base"
    head = card(outcome, config, True, ["latentdiff"]).split("---\n")[1]
    assert "base_model" not in yaml.safe_load(head)


def test_a_push_that_fails_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    outcome, config = a_run(tmp_path, push_to_hub="someone/cats")
    with pytest.raises(UserError, match="someone/cats: not pushed") as caught:
        share(outcome, config)
    assert "\n" not in str(caught.value)
    assert str(outcome.folder) in str(caught.value)
    assert (outcome.folder / "README.md").is_file()
    with pytest.raises(UserError, match="not pushed"):
        push(outcome, "someone/cats")


def calls(text: str, language: str) -> str:
    """The one block of that language in a card's part on its use."""
    _, _, use = text.partition("## Use")
    (block,) = re.findall(rf"```{language}\n(.*?)```", use, re.DOTALL)
    return block


@pytest.mark.parametrize("kind", ["lora", "model", "inpainting"])
def test_every_call_of_a_card_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Word for word, of float16 weights, beside the folder of what was learned."""
    inpaints = kind == "inpainting"
    bundle = tiny_bundle(in_channels=9 if inpaints else 4)
    data, out = PicturesConfig(root=tmp_path / "pictures"), tmp_path / "cats"
    base = str(bundle.save(tmp_path / "base"))
    config = FinetuneConfig(
        method="lora" if kind == "lora" else "full", model=base, data=data, out=out
    )
    caption = 'a "red"\n cat\'s'
    pictures = [Example(Path("0.png"), (caption,), {})]
    save_outcome(make_trainable(bundle, config), config, pictures)
    folder = out if kind == "lora" else out / "model"
    text = (folder / "README.md").read_text("utf-8")
    monkeypatch.chdir(folder.parent)
    if inpaints:
        Image.new("RGB", (16, 16), "red").save("picture.png")
        Image.new("L", (16, 16), 255).save("mask.png")
    given: dict[str, Any] = {}
    if kind == "lora":
        given["pipe"] = StableDiffusionPipeline.from_pretrained(base)
    exec(compile(calls(text, "python"), "README.md", "exec"), given)
    assert given["image"].size == (16, 16)
    command = shlex.split(calls(text, "sh"))
    assert command.pop(0) == "latentdiff"
    assert command[1 + inpaints] == " ".join(caption.split())
    assert main(command) == 0
    assert len(list(Path("outputs").iterdir())) == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_pushed_tells_neither_place_nor_machine(
    tmp_path: Path, method: Literal["lora", "full"]
) -> None:
    data, out = PicturesConfig(root=tmp_path / "pictures"), tmp_path / "cats"
    base = str(tiny_bundle().save(tmp_path / "base"))
    config = FinetuneConfig(method=method, model=base, data=data, out=out)
    make_folder(out)
    records = Records(out, 0)
    records.scalars(1, {"loss": 1.0})
    records.picture(1, "samples", Image.new("RGB", (8, 8)))
    records.close()
    bundle = Bundle.load(base)
    save_outcome(make_trainable(bundle, config), config, [Example(tmp_path / "a.png", ("a",), {})])
    folder, kind = (out, "lora") if method == "lora" else (out / "model", "model")
    outcome = Outcome(folder, kind, base, [], data.root)
    pushed = [path for path in outcome.folder.rglob("*") if path.is_file()]
    if outcome.files is not None:
        pushed = [path for path in pushed if path.name in outcome.files]
    assert {"README.md", "samples.png"} <= {path.name for path in pushed}
    told = {path.name: path.read_bytes() for path in pushed}
    for name, content in told.items():
        assert str(tmp_path).encode() not in content, name
        assert platform.node() not in name
    assert method == "lora" or len(told) > 8


def test_a_card_promises_diffusers_only_what_it_draws(tmp_path: Path) -> None:
    outcome, config = a_run(tmp_path)
    for number, bundle in enumerate((tiny_bundle(process="edm"), tiny_bundle(vae="vq"))):
        folder = bundle.save(tmp_path / f"model{number}")
        model = Outcome(folder, "model", "", outcome.pictures, outcome.root)
        text = card(model, config, False, ["latentdiff"])
        assert "latentdiff generate" in text
        assert "No pipeline of diffusers draws" in text
        assert "from_pretrained" not in text
        assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "latentdiff"


@pytest.mark.parametrize("name", ["cats", "a/b/c", "../x", "a b/c", ""])
def test_a_name_that_is_none_is_refused_before_training(name: str) -> None:
    with pytest.raises(ValidationError):
        CardConfig(push_to_hub=name)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    outcome, config = a_run(tmp_path)
    gone = Outcome(tmp_path / "gone", "model", "", outcome.pictures, outcome.root)
    with pytest.raises(UserError, match=r"cannot write .*gone"):
        share(gone, config)
