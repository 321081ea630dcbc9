"""Folders of Stable Diffusion XL that are damaged, of another make, or ask for what is not here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_xl

from latentdiff import UserError
from latentdiff.bundle import Bundle
from latentdiff.cli import main

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xl().save(tmp_path_factory.mktemp("xl") / "model")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("model_index", {"force_zeros_for_empty_prompt": "yes"}, "must be true or false"),
        ("model_index", {"is_cosxl_edit": True}, "is_cosxl_edit: such a model"),
        ("model_index", {"image_encoder": ["transformers", "X"]}, "it has a part image_encoder"),
        ("model_index", {"requires_aesthetics_score": True}, "20 and 5 numbers in 8 waves"),
        ("model_index", {"text_encoder": [None, None]}, "width 40, but the text encoder's have 24"),
        ("unet/config", {"addition_embed_type": "text"}, "config"),
        ("unet/config", {"addition_time_embed_dim": "x"}, "addition_time_embed_dim is 'x'"),
        ("unet/config", {"projection_class_embeddings_input_dim": None}, "describes no network"),
        ("unet/config", {"addition_time_embed_dim": 4}, "and 6 numbers in 4 waves each"),
        ("unet/config", {"transformer_layers_per_block": [1, 10**6]}, "it asks for"),
        ("text_encoder_2/config", {"model_type": "t5"}, "is no CLIP text model"),
        ("text_encoder_2/config", {"hidden_act": "relu"}, "only plain ones of CLIP work here"),
        ("text_encoder_2/config", {"projection_dim": 21}, "text_projection.weight should be"),
        ("text_encoder_2/config", {"projection_dim": None}, "describes no network"),
        ("text_encoder/config", {"max_position_embeddings": 6}, "position_embedding"),
        ("tokenizer_2/tokenizer_config", {"model_max_length": 9}, "their windows differ"),
    ],
)
def test_what_does_not_fit_is_one_line(
    file: str, change: dict[str, Any], told: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    path = folder / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=told) as caught:
        Bundle.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_config_leaves_out_is_as_diffusers_has_it(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    del index["force_zeros_for_empty_prompt"]
    path.write_text(json.dumps(index))
    assert "empty prompts zero" in Bundle.load(folder).conditioner.padding


def test_info_names_its_parts(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(saved)]) == 0
    told = capsys.readouterr().out
    for part in ("CrossAttentionUNet", "ClipTextEncoder,", "ClipTextEncoderWithProjection"):
        assert part in told
