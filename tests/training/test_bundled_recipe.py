"""The bundled model's recipe from words to answers, by a tiny teacher on drawn shapes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scripts import script
from shapes import POLYGONS, shape_folder
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertModel

from latentdiff import LatentDiffusionPipeline
from latentdiff.bundle import Bundle

WORDS = """\
00000001 03 n 01 entity 0 000 | what is
00000002 06 n 01 artifact 0 001 @ 00000001 n 0000 | a thing made by people
00000003 06 n 02 rocket 0 projectile 0 001 @ 00000002 n 0000 | a thing made to fly far
"""

# Of each kind that eight shapes allow: how many questions, and what is told of their pictures.
ASKED = {
    "colour x thing": (1, {"colour", "shape", "colour and shape"}),
    "synonyms": (3, {"shows"}),  # cottage, spaceship, wigwam
    "train": (6, {"shows"}),
    "counts": (3, {"count"}),
    "pairs": (3, {"both", "two"}),
    "test_style": (1, {"shows"}),
}


def wordnet(folder: Path) -> Path:
    folder.mkdir()
    (folder / "data.noun").write_text("  1 a licence\n" + WORDS)
    lines = "rocket n 1 1 @ 1 0 00000003\nprojectile n 1 1 @ 1 0 00000003\n"
    (folder / "index.noun").write_text("  1\n" + lines)
    return folder


def teacher(folder: Path) -> Path:
    """A sentence encoder of one layer that tells letters apart."""
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{one}" for one in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    # `begin_from` leaves out the first thousand, which in BERT's vocabulary are unused.
    vocabulary |= {f"[unused{number}]": number for number in range(len(pieces), 1100)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = BertConfig(
        vocab_size=1100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    config.to_json_file(folder / "config.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


def test_the_recipe_goes_from_words_to_a_model_that_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of its four commands, few steps; what one leaves the next one reads."""
    data, words = shape_folder(tmp_path / "shapes"), wordnet(tmp_path / "wordnet")
    script("text").main(
        data, teacher(tmp_path / "teacher"), words, tmp_path / "text", steps=3, batch=8,
        vocabulary=520, window=32, width=64, layers=2, composed=30, lemmas=10, save_every=3,
    )  # fmt: skip
    train = script("emoji128").main
    few = json.dumps({"composed": 256, "text_takes": 0.1, "vae_batch": 2, "batch": 4})
    first, more = tmp_path / "first/model", tmp_path / "more/model"
    train(data, tmp_path / "text", None, tmp_path / "first", first, words, 0.1, True,
          settings=few)  # fmt: skip
    train(data, None, first, tmp_path / "more", more, words, 0.1, True, settings=few)
    was, now = Bundle.load(first, device="cpu"), Bundle.load(more, device="cpu")
    for noun in ("unet", "vae", "text_encoder"):
        parts = [dict(bundle.modules[noun].named_parameters()) for bundle in (was, now)]
        assert parts[0].keys() == parts[1].keys()
        moved = [not torch.equal(parts[0][name], parts[1][name]) for name in parts[0]]
        assert any(moved), noun
    assert (now.size, now.steps.spacing) == ((128, 128), "trailing")
    assert len(now.captions) == len(POLYGONS)
    report = json.loads((tmp_path / "more/report.json").read_text("utf-8"))
    assert {"vae_psnr_db", "steps", "composed"} <= report.keys()

    script("measure/evaluate_following").main(
        more, data, tmp_path / "following", words, most=3, steps=2
    )
    asked = json.loads((tmp_path / "following/report.json").read_text("utf-8"))
    kinds = {kind: marks for kind, marks in asked.items() if isinstance(marks, dict)}
    assert {kind: (marks.pop("of"), set(marks)) for kind, marks in kinds.items()} == ASKED
    for kind, (count, _) in ASKED.items():
        parts = {round(number / count, 4) for number in range(count + 1)}
        assert parts >= set(kinds[kind].values()), kind
    assert (tmp_path / "following/sheet.webp").is_file()
    picture = LatentDiffusionPipeline(now)("a rocket", seed=0, num_inference_steps=2).images[0]
    assert picture.size == (128, 128)
    capsys.readouterr()
