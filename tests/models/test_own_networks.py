"""Our networks and tokenizer beside those of diffusers and transformers: the same, bit for bit."""

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tiny import (
    CAPTIONS,
    clip_tokenizer,
    draw_weights,
    sd_like,
    sd_unet,
    tiny_bundle,
    tiny_clip,
    tiny_penultimate,
    tiny_unet,
    tiny_vae,
    tiny_xl_unet,
    tower_of,
    vae_of,
)
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from latentdiff.bundle import Bundle
from latentdiff.cli import main
from latentdiff.models.attention import AttentionLayer, auto, explicit, sdpa, set_attention
from latentdiff.models.clip_text import ClipTextConfig, ClipTextEncoder
from latentdiff.models.clip_tokenizer import ClipTokenizer
from latentdiff.models.cross_attention_unet import CrossAttentionUNet
from latentdiff.models.kl_autoencoder import KLAutoencoder
from latentdiff.models.t5_text import T5TextConfig, T5TextEncoder
from latentdiff.models.unet import build_unet
from latentdiff.models.working_memory import unet_bytes

UNETS = {
    "tiny": lambda: tiny_unet(),
    "inpainting, with variances": lambda: tiny_unet(9, 8),
    "guidance scales": lambda: tiny_unet(guidance_width=24),
    "labels of a table": lambda: tiny_unet(7, labels="table"),
    "labels in waves": lambda: tiny_unet(7, labels="waves"),
    "sizes and pooled text": lambda: tiny_unet(sizes=True),
    "xl": lambda: tiny_xl_unet(),
    "sd1": lambda: sd_unet(1),
    "sd2, linear projections": lambda: sd_unet(2),
}


def config_of(network: Any) -> dict[str, Any]:
    return json.loads(network.to_json_string())


def own_unet(theirs: UNet2DConditionModel) -> CrossAttentionUNet:
    config = config_of(theirs)
    assert CrossAttentionUNet.understands(config)
    own = CrossAttentionUNet(config)
    own.load_state_dict(theirs.state_dict())
    assert own.config == {key: value for key, value in config.items() if key[0] != "_"}
    return own


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", UNETS)
def test_the_unet_is_that_of_diffusers(kind: str, backend: Any) -> None:
    """Also at sizes that no level halves evenly, with a mask, and with residuals of a control
    network; and the gradients of training within rounding, with and without checkpoints."""
    theirs, random = UNETS[kind](), torch.Generator().manual_seed(0)
    own: Any = own_unet(theirs)
    set_attention(theirs, backend)
    set_attention(own, backend)
    width: int = theirs.config["cross_attention_dim"]
    for count, size in ((1, (8, 8)), (3, (13, 10))):
        x = torch.randn(count, own.config["in_channels"], *size, generator=random)
        states, t = torch.randn(count, 7, width, generator=random), torch.linspace(9, 950, count)
        mask = torch.rand(count, 7, generator=random) > 0.4
        mask[:, 0] = True
        pooled = theirs.config["projection_class_embeddings_input_dim"] or 6 * 8
        sizes = {"text_embeds": torch.rand(count, pooled - 6 * 8, generator=random)}
        sizes |= {"time_ids": 100 * torch.rand(count, 6, generator=random)}
        given: dict[str, Any] = {"added_cond_kwargs": sizes if pooled > 6 * 8 else None}
        if own.config["time_cond_proj_dim"] is not None:
            given["timestep_cond"] = torch.randn(count, 24, generator=random)
        if own.class_embedding is not None:
            given["class_labels"] = torch.tensor([0, 349, 999])[:count]
        for seen in (None, mask):
            given["encoder_attention_mask"] = seen
            wanted = theirs(x, t, states, **given).sample
            assert torch.equal(own(x, t, states, **given), wanted)
        given["mid_block_additional_residual"] = torch.randn(1, generator=random)
        count = sum(len(block.resnets) + len(block.downsamplers) for block in own.down_blocks)
        given["down_block_additional_residuals"] = torch.randn(count + 1, generator=random)
        assert torch.equal(own(x, t, states, **given), theirs(x, t, states, **given).sample)
    theirs(x, t, states, **given).sample.square().mean().backward()
    other: dict[str, Any] = dict(theirs.named_parameters())
    for checkpoints in (False, True):
        own.zero_grad()
        if checkpoints:
            own.enable_gradient_checkpointing()
        own(x, t, states, **given).square().mean().backward()
        for name, parameter in own.named_parameters():
            wanted = other[name].grad
            assert (parameter.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


@pytest.mark.parametrize(
    ("dtype", "learns", "places", "expected"),
    [
        (torch.bfloat16, True, 64, explicit),
        (torch.bfloat16, False, 64, sdpa),  # whose forward pass is the faster one
        (torch.bfloat16, True, 1024, sdpa),
        (torch.float32, True, 64, sdpa),
    ],
)
def test_attention_trains_by_what_is_faster_there(
    dtype: torch.dtype, learns: bool, places: int, expected: Any
) -> None:
    """By default; each is told from the other by its bits."""
    random = torch.Generator().manual_seed(0)
    layer = draw_weights(AttentionLayer(16, 2), 0)
    x = torch.randn(2, places, 16, generator=random)
    answers: dict[Any, Tensor] = {}
    for processor in (layer.processor, explicit, sdpa):
        layer.processor = processor
        with (
            torch.set_grad_enabled(learns),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            answers[processor] = layer(x)
    assert not torch.equal(answers[explicit], answers[sdpa])
    assert torch.equal(answers[auto], answers[expected])


def test_a_fresh_unet_begins_as_one_of_diffusers() -> None:
    shape = (4, 8, (64, 64), 1, (True, False), 16, 24)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        own = build_unet(*shape)
        torch.manual_seed(3)
        theirs = UNet2DConditionModel(**own.config)
    assert [name for name, _ in own.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name
    assert all(parameter.requires_grad for parameter in own.parameters())


@torch.no_grad()
@pytest.mark.parametrize("statistics", ["scale", "channels"])
def test_the_autoencoder_is_that_of_diffusers(statistics: str) -> None:
    theirs: Any
    for theirs in (tiny_vae(statistics=statistics), vae_of(sd_like(1)), _bare_vae()):
        config = config_of(theirs)
        assert KLAutoencoder.understands(config)
        own = KLAutoencoder(config)
        own.load_state_dict(theirs.state_dict())
        for size in ((16, 16), (24, 40)):
            pictures = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
            wanted, got = theirs.encode(pictures).latent_dist, own.encode(pictures)
            assert torch.equal(got.mean, wanted.mean)
            assert torch.equal(got.std, wanted.std)
            assert torch.equal(own.decode(got.mean), theirs.decode(got.mean).sample)


def _bare_vae() -> AutoencoderKL:
    """Without the parts that newer checkpoints leave out."""
    bare = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return draw_weights(bare, 0)


@torch.no_grad()
def test_the_text_encoder_is_that_of_transformers() -> None:
    assert ClipTextConfig.__annotations__.keys() == CLIPTextConfig.__annotations__.keys() - {
        "model_type",
        "base_config_key",
    }
    defaults = CLIPTextConfig()
    assert all(getattr(defaults, f.name) == f.default for f in fields(ClipTextConfig))
    for tower in (tiny_clip(), tower_of(sd_like(1)), tower_of(sd_like(2))):
        told = {name: getattr(tower.model.config, name) for name in ClipTextConfig.__annotations__}
        own = ClipTextEncoder(ClipTextConfig(**told))
        own.load_state_dict(tower.model.state_dict())
        ids = tower.tokenize(CAPTIONS).ids
        wanted: Any = tower.model(input_ids=ids)
        assert torch.equal(own(ids).last_hidden_state, wanted.last_hidden_state)


T5S: dict[str, dict[str, Any]] = {
    "as T5": {},
    "as T5 1.1": {"feed_forward_proj": "gated-gelu"},
    "far": {"relative_attention_num_buckets": 9, "relative_attention_max_distance": 17},
    "told apart": {"dense_act_fn": "gelu_new", "is_gated_act": True},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", T5S)
def test_the_t5_encoder_is_that_of_transformers(kind: str) -> None:
    """With masks and without, over more tokens than there are buckets; in bfloat16 too."""
    config: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24}
    config |= {"num_layers": 3, "num_heads": 2, **T5S[kind]}
    with torch.random.fork_rng([]):
        theirs = draw_weights(T5EncoderModel(T5Config(**config)), 0)
    told = T5TextConfig(**config)
    assert T5TextEncoder.understands(told)
    own = T5TextEncoder(told).eval()
    own.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 40, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(150) < torch.tensor([[150], [9], [70]])
    for length in (1, 12, 150):
        for seen in (None, mask[:, :length], torch.ones_like(mask[:, :length])):
            wanted: Any = theirs(ids[:, :length], attention_mask=seen)
            got = own(ids[:, :length], seen).last_hidden_state
            assert torch.equal(got, wanted.last_hidden_state)
    low: Any = theirs.bfloat16()(ids, attention_mask=mask)
    own.bfloat16()
    assert torch.equal(own(ids, mask).last_hidden_state, low.last_hidden_state)


def test_the_t5_encoder_learns_as_that_of_transformers() -> None:
    """Gradients within rounding; and what is dropped is, from the same random state."""
    config: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24}
    config |= {"num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    with torch.random.fork_rng([]):
        theirs, own = T5EncoderModel(T5Config(**config)), T5TextEncoder(T5TextConfig(**config))
        own.load_state_dict(draw_weights(theirs, 0).state_dict())
        ids = torch.arange(20).view(2, 10)
        answers: list[Tensor] = []
        for model in (theirs, own):
            torch.manual_seed(3)
            said: Any = model.train()(ids)
            answers.append(said.last_hidden_state)
            answers[-1].square().mean().backward()
            assert (model.eval()(ids).last_hidden_state - answers[-1]).abs().max() > 0.1
        torch.testing.assert_close(*answers)
    other = dict(theirs.named_parameters())
    assert [name for name, _ in own.named_parameters()] == list(other)
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, other[name].grad)


def test_what_is_another_t5_is_left_to_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defaults are theirs, too; a folder opens as ours or as theirs, and is saved alike."""
    own_keys = {"dense_act_fn", "is_gated_act"}
    assert T5TextConfig.__annotations__.keys() - own_keys == T5Config.__annotations__.keys() - {
        "model_type"
    }
    defaults, named = T5Config(), [f for f in fields(T5TextConfig) if f.name not in own_keys]
    assert all(getattr(defaults, f.name) == f.default for f in named if "layers" not in f.name)
    others: list[dict[str, Any]] = [{"feed_forward_proj": "gated-silu"}, {"is_decoder": True}]
    for change in others:
        assert not T5TextEncoder.understands(T5TextConfig(**change))
    folder = tiny_bundle(tower="t5").save(tmp_path / "model")
    ours = Bundle.load(folder)
    assert isinstance(tower_of(ours).model, T5TextEncoder)
    again = ours.save(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        path = Path("text_encoder") / name
        assert (folder / path).read_bytes() == (again / path).read_bytes()
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dense_act_fn": "gelu"}))
    assert isinstance(tower_of(Bundle.load(folder)).model, T5EncoderModel)
    assert main(["info", str(folder)]) == 0
    assert "T5EncoderModel of transformers, " in capsys.readouterr().out


@torch.no_grad()
def test_penultimate_states_and_the_pooled_vector_are_those_of_transformers() -> None:
    """Also where a prompt fills its window."""
    kinds: tuple[Any, Any] = CLIPTextModel, CLIPTextModelWithProjection
    number: Any
    for number, kind in enumerate(kinds, 1):
        tower = tiny_penultimate(number)
        theirs = kind(CLIPTextConfig(**vars(tower.model.config))).eval()
        named = tower.model.state_dict()
        if number == 2:
            alone = "text_projection.weight"
            named = {n if n == alone else f"text_model.{n}": v for n, v in named.items()}
        theirs.load_state_dict(named)
        tokens = tower.tokenize([*CAPTIONS, ""])
        got = tower.states(tokens)
        said = theirs(tokens.ids, output_hidden_states=True)
        assert torch.equal(got.states, said.hidden_states[-2])
        if number == 2:
            assert got.pooled is not None
            assert torch.equal(got.pooled, said.text_embeds)
        else:
            assert got.pooled is None


@pytest.mark.parametrize(
    "change",
    [
        {"only_cross_attention": True},
        {"resnet_time_scale_shift": "scale_shift"},
        {"transformer_layers_per_block": [[1], [1]]},
        {"something_new": 1},
        {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]},
    ],
)
def test_what_is_not_known_is_left_to_diffusers(change: dict[str, Any]) -> None:
    config = config_of(tiny_unet())
    assert CrossAttentionUNet.understands(config)
    assert not CrossAttentionUNet.understands(config | change)


def test_a_folder_opens_as_ours_or_as_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are saved alike, and draw alike."""
    made = tiny_bundle()
    folder = made.save(tmp_path / "model")
    ours = Bundle.load(folder)
    kinds = [type(module) for module in ours.modules.values()]
    assert kinds == [CrossAttentionUNet, KLAutoencoder, ClipTextEncoder]
    again = ours.save(tmp_path / "again")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.name == "tokenizer_config.json":  # transformers notes where it has read one
            continue
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes(), path
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {"timestep_post_act": None, "dropout": 0.1}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    assert isinstance(Bundle.load(folder).network.module, UNet2DConditionModel)
    assert main(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "UNet2DConditionModel of diffusers, " in told
    assert "KLAutoencoder, " in told


def test_working_memory_grows_with_pictures_and_pixels() -> None:
    """The skips alone are a lower bound; each level and each row of a batch adds its own."""
    unet: Any = tiny_unet()
    own, bare = CrossAttentionUNet(config_of(unet)), torch.nn.Linear(2, 2)
    plain = unet_bytes(own, 1, 8, 8)
    assert plain == unet_bytes(unet, 1, 8, 8)
    widths, layers = own.config["block_out_channels"], own.config["layers_per_block"]
    skips = sum(4 * (layers + 1) * w * 64 / 4**n for n, w in enumerate(widths))
    assert plain is not None
    assert plain > 2 * skips
    assert unet_bytes(own, 6, 8, 8) == unet_bytes(own, 1, 16, 24) == 6 * plain
    assert unet_bytes(own.to(torch.bfloat16), 1, 8, 8) == plain / 2
    assert unet_bytes(bare, 1, 8, 8) is None


PROMPTS = (
    *CAPTIONS,
    "",
    "A  RED\theart's 12345 é ﬁ ! <|startoftext|> <|endoftext|> it's we'll",
    "日本語のテキスト 🎉🎉 ... ...!!!",
    "x" * 200,
    "\u0130stanbul a\u0301b \x00 \u200b",
)
STYLES: dict[str, dict[str, Any]] = {
    "as saved here": {},
    "padded by !": {"pad_token": "!"},
    "no settings": {"model_max_length": None},
    "of Stable Diffusion 1": {
        "bos_token": {"content": "<|startoftext|>"},
        "eos_token": {"content": "<|endoftext|>"},
        "unk_token": {"content": "<|endoftext|>"},
        "do_lower_case": True,
        "errors": "replace",
    },
}


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
@pytest.mark.parametrize("style", STYLES)
def test_the_tokenizer_is_that_of_transformers(style: str, files: str, tmp_path: Path) -> None:
    """The whole serialised tokenizer, and what it says."""
    saved = clip_tokenizer()
    saved.save_pretrained(tmp_path)
    if files != "tokenizer.json":
        saved.backend_tokenizer.model.save(str(tmp_path))
        (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | STYLES[style]
    flags = {"__type": "AddedToken", "lstrip": False, "normalized": True}
    flags |= {"rstrip": False, "single_word": False}
    config = {k: v | flags if isinstance(v, dict) else v for k, v in config.items()}
    config = {k: v for k, v in config.items() if v is not None}
    path.write_text(json.dumps(config))
    own, theirs = ClipTokenizer.read(tmp_path, config), CLIPTokenizer.from_pretrained(tmp_path)
    if style.startswith("of") and files == "tokenizer.json":
        assert own is None  # the two files say two things
        return
    assert own is not None
    assert own.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (own.pad_token, own.pad_token_id) == (theirs.pad_token, theirs.pad_token_id)
    assert own.model_max_length == theirs.model_max_length
    back = own.in_transformers()
    assert back.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    for prompt in PROMPTS:
        assert own.backend_tokenizer.encode(prompt).ids == theirs(prompt).input_ids


def test_a_tokenizer_with_more_words_is_left_to_transformers(tmp_path: Path) -> None:
    saved = copy.deepcopy(clip_tokenizer())  # every test shares the one
    saved.add_tokens(["<my-style>"])
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert ClipTokenizer.read(tmp_path, config) is None
