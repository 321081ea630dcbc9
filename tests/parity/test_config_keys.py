"""Every key of a network's config moves the output as it moves diffusers', or is refused by name.

A key is dropped, set to its class's default, to another value, or is a stranger.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import WIDTH, tiny_bundle, tiny_pixart
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from latentdiff.diffusion.condition import Condition
from latentdiff.errors import UserError
from latentdiff.formats import diffusers_folder as parts
from latentdiff.formats import pixart
from latentdiff.formats.autoencoder_files import load_autoencoder
from latentdiff.formats.weights import fill
from latentdiff.models.network import DiffusersUNet
from latentdiff.models.pixart import PixArtNetwork

RANDOM = torch.Generator().manual_seed(1)
X = torch.randn(2, 4, 8, 8, generator=RANDOM)
STATES = torch.randn(2, 5, WIDTH, generator=RANDOM)
T = torch.tensor([3.0, 700.0])
SIZES = torch.tensor([[64.0, 32, 2]] * 2)
PICTURES = torch.rand(1, 3, 16, 16, generator=RANDOM)
PROMPTS = ["a red heart", "a cat"]
CPU = torch.device("cpu")
Theirs = Callable[[Path], Tensor]


def _our_unet(folder: Path) -> Tensor:
    module, files = parts.unet(folder / "unet")
    network = DiffusersUNet(fill(module, files, torch.float32, CPU), 4)
    return network(X, T, Condition(states=STATES))


def _their_unet(folder: Path) -> Tensor:
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
    return unet(X, T, STATES).sample


def _our_transformer(folder: Path) -> Tensor:
    module, files = pixart.transformer(folder / "transformer", None)
    network = PixArtNetwork(fill(module, files, torch.float32, CPU), 4)
    return network(X, T, Condition(states=STATES, sizes=SIZES))


def _their_transformer(folder: Path) -> Tensor:
    """As their pipelines take the first half of its output."""
    module: Any = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    sizes = {"resolution": SIZES[:, :2], "aspect_ratio": SIZES[:, 2:]}
    return module(X, STATES, T, sizes).sample[:, :4]


def _our_vae(folder: Path) -> Tensor:
    autoencoder = load_autoencoder(folder / "vae")
    return autoencoder.decode(autoencoder.encode(PICTURES) + X[:1])


def _their_vae(folder: Path) -> Tensor:
    """As diffusers' Stable Diffusion pipelines scale latents; theirs read no mean and deviation."""
    config = json.loads((folder / "vae" / "config.json").read_text())
    kind: Any = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[config["_class_name"]]
    vae = kind.from_pretrained(folder / "vae")
    encoded = vae.encode(PICTURES)
    z = encoded.latents if kind is VQModel else encoded.latent_dist.mode()
    scale = vae.config.scaling_factor
    return vae.decode((z * scale + X[:1]) / scale).sample


def _our_text(folder: Path) -> Tensor:
    tower, files = parts.text(folder / "text_encoder", folder / "tokenizer")
    fill(tower.model, files, torch.float32, CPU)
    return tower.encode(PROMPTS).states


def _their_text(folder: Path) -> Tensor:
    """As `StableDiffusionPipeline.encode_prompt` has it; T5 as the pipelines that use T5."""
    tower, _ = parts.text(SOUND[folder.name] / "text_encoder", folder / "tokenizer")
    tokens = tower.tokenize(PROMPTS)
    kind: Any = CLIPTextModel if folder.name == "clip" else T5EncoderModel
    model = kind.from_pretrained(folder / "text_encoder")
    masked = kind is T5EncoderModel or getattr(model.config, "use_attention_mask", False)
    return model(tokens.ids, attention_mask=tokens.mask.long() if masked else None)[0]


# Model, the folder of the network, its class, what it does here and in diffusers or transformers.
NETWORKS: dict[str, tuple[str, type, Theirs, Theirs]] = {
    "unet": ("unet", UNet2DConditionModel, _our_unet, _their_unet),
    "pixart": ("transformer", PixArtTransformer2DModel, _our_transformer, _their_transformer),
    "vae": ("vae", AutoencoderKL, _our_vae, _their_vae),
    "vq": ("vae", VQModel, _our_vae, _their_vae),
    "clip": ("text_encoder", CLIPTextConfig, _our_text, _their_text),
    "t5": ("text_encoder", T5Config, _our_text, _their_text),
}
SOUND: dict[str, Path] = {}
# Read here as the pipelines of Flux and others read them; those of Stable Diffusion pass them over.
# `test_the_latent_scale_shift_and_statistics` holds them to their formula.
OWN = {"shift_factor", "latents_mean", "latents_std"}
STRANGERS = ["zzz", "use_attention_mask", "return_dict", "output_hidden_states", "torchscript"]
STRANGERS += ["quantization_config", "is_gated_act", "dense_act_fn", "tie_word_embeddings"]
VALUES: list[object] = [None, True, False, 0, 1, 2, 3, 8, 32, -1, 0.5, 1e-3, [1], [8, 8], {}, ""]
WORDS = ["gelu", "relu", "silu", "mish", "layer_norm", "group_norm", "scale_shift", "ada_group"]
WORDS += ["spatial", "fourier", "gated", "timestep", "identity", "text", "text_time", "text_proj"]
WORDS += ["UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn", "gated-gelu", "quick_gelu"]
# Each moves the output and is obeyed: were all refused, nothing would be shown.
OBEYED: list[tuple[str, str, object]] = [
    ("unet", "act_fn", "gelu"),
    ("unet", "flip_sin_to_cos", False),
    ("unet", "freq_shift", 1),
    ("unet", "center_input_sample", True),
    ("unet", "norm_eps", 0.5),
    ("unet", "norm_num_groups", 4),
    ("unet", "attention_head_dim", 2),
    ("unet", "downsample_padding", 0),
    ("unet", "mid_block_scale_factor", 2.0),
    ("unet", "timestep_post_act", "silu"),
    ("pixart", "sample_size", 128),
    ("pixart", "interpolation_scale", 3),
    ("vae", "act_fn", "gelu"),
    ("vae", "norm_num_groups", 2),
    ("vae", "scaling_factor", 0.3),
    ("clip", "hidden_act", "gelu"),
    ("clip", "layer_norm_eps", 0.5),
    ("clip", "num_attention_heads", 4),
    ("clip", "use_attention_mask", True),
    ("t5", "dense_act_fn", "gelu"),
    ("t5", "layer_norm_epsilon", 0.5),
]


def _keys(network: str) -> list[str]:
    place, kind, _, _ = NETWORKS[network]
    if place == "text_encoder":  # what every class of transformers has, besides, is not read here
        return sorted(kind.__annotations__) + STRANGERS
    return sorted({*inspect.signature(kind.__init__).parameters} - {"self"} - OWN) + STRANGERS


@pytest.fixture(scope="module", autouse=True)
def saved(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The models of `NETWORKS` in `SOUND`, and beside each a copy whose config is changed."""
    root = tmp_path_factory.mktemp("keys")
    for name in NETWORKS:
        bundle = tiny_bundle(
            vae="vq" if name == "vq" else "kl", tower="t5" if name == "t5" else "clip"
        )
        bundle = tiny_pixart() if name == "pixart" else bundle
        SOUND[name] = bundle.save(root / name)
        shutil.copytree(SOUND[name], root / "changed" / name)


@torch.no_grad()
def _compare(network: str, key: str, change: Callable[[dict[str, object]], object]) -> str:
    """What became of a change: "refused", "moved" or "unmoved"; diffusers did the same."""
    place, _, ours, theirs = NETWORKS[network]
    folder = SOUND[network].parent / "changed" / network
    config = json.loads((SOUND[network] / place / "config.json").read_text())
    change(config)
    (folder / place / "config.json").write_text(json.dumps(config))
    try:
        got = ours(folder)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert key in message or str(folder / place) in message or message.startswith(place), (
            message
        )
        return "refused"
    try:
        wanted = theirs(folder).float()
    except Exception:  # of a value that they cannot use, and that nothing here looks at
        assert torch.equal(got, ours(SOUND[network]))
        return "unmoved"
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    same = torch.equal(got, ours(SOUND[network]))
    return "unmoved" if same else "moved"


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_key_moves_the_output_as_elsewhere_or_is_refused(
    network: str, data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(_keys(network)))
    if data.draw(st.integers(0, 4)) == 0:
        _compare(network, key, lambda config: config.pop(key, None))
        return
    value = data.draw(st.sampled_from([*VALUES, *WORDS]))
    if key.endswith(("eps", "epsilon")) and type(value) is int:
        value = float(value)  # transformers takes no 1 for 1.0, which is the same here
    _compare(network, key, lambda config: config.update({key: value}))


# Values that a key's type does not tell; of the others `_other` makes one.
SWEPT: dict[str, object] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "only_cross_attention": True,
    "act_fn": "gelu",
    "hidden_act": "gelu",
    "norm_num_groups": 2,
    "block_out_channels": [16, 16],
    "layers_per_block": 2,
    "reverse_transformer_layers_per_block": [1, 1],
    "encoder_hid_dim_type": "text_proj",
    "num_attention_heads": 4,
    "attention_head_dim": 2,
    "class_embed_type": "timestep",
    "addition_embed_type": "text",
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "time_embedding_act_fn": "silu",
    "timestep_post_act": "silu",
    "attention_type": "gated",
    "cross_attention_norm": "layer_norm",
    "sample_size": 16,
    "upcast_attention": True,
    "dropout": 0.5,
    "projection_class_embeddings_input_dim": 8,
    "addition_time_embed_dim": 8,
    "latents_mean": [0.1] * 4,
    "latents_std": [0.5] * 4,
    "shift_factor": 0.2,
    "attention_dropout": 0.5,
    "eos_token_id": 3,
    "dropout_rate": 0.5,
}
# What each key does to a network of ours that goes on to be ours; any other key leads to the class
# of diffusers or transformers, which `_compare` holds to its own picture, or is refused by name.
OURS: dict[str, dict[str, set[str]]] = {
    "unet": {
        "moved": {"flip_sin_to_cos", "freq_shift", "norm_eps", "norm_num_groups"}
        | {"attention_head_dim"},
        "unmoved": {"sample_size", "upcast_attention", "addition_embed_type_num_heads"}
        | {"addition_time_embed_dim", "projection_class_embeddings_input_dim"},
    },
    "pixart": {
        "moved": {"interpolation_scale", "norm_eps", "sample_size"},
        "unmoved": {"norm_num_groups", "num_embeds_ada_norm", "upcast_attention"},
    },
    "vae": {
        "moved": {"norm_num_groups", "scaling_factor"},
        "unmoved": {"force_upcast", "sample_size"},
    },
    "clip": {
        "moved": {"hidden_act", "layer_norm_eps", "num_attention_heads"},
        "unmoved": {"bos_token_id", "eos_token_id", "initializer_factor", "initializer_range"}
        | {"pad_token_id", "projection_dim"},
    },
    "t5": {
        "moved": {"layer_norm_epsilon"},
        "unmoved": {"classifier_dropout", "dropout_rate", "eos_token_id", "initializer_factor"}
        | {"is_encoder_decoder", "num_decoder_layers", "pad_token_id", "use_cache"}
        | {"relative_attention_max_distance"},  # of prompts so short
    },
}


def _other(key: str, default: object) -> object:
    """A value that is not a key's default."""
    if key in SWEPT:
        return SWEPT[key]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return 2 * default + 1
    return 8


def _is_ours(network: str) -> bool:
    """Whether the network of the changed folder is of a class of ours."""
    folder = SOUND[network].parent / "changed" / network
    if network == "pixart":
        return True  # or refused
    if network in ("clip", "t5"):
        module = parts.text(folder / "text_encoder", folder / "tokenizer")[0].model
    else:
        module = (parts.unet if network == "unet" else parts.vae)(folder / NETWORKS[network][0])[0]
    return type(module).__module__.startswith("latentdiff.")


@pytest.mark.parametrize("network", OURS)
def test_every_key_of_our_own_networks(network: str) -> None:
    """The full sweep: no key is passed over, and a later diffusers' new key is found here."""
    place, kind, _, _ = NETWORKS[network]
    config = json.loads((SOUND[network] / place / "config.json").read_text())
    signature = inspect.signature(kind.__init__).parameters
    found: dict[str, set[str]] = {"moved": set(), "unmoved": set()}
    for key in sorted({*_keys(network)} - {*STRANGERS}):
        default = signature[key].default if key in signature else getattr(kind, key)
        value = _other(key, config.get(key, default))
        done = _compare(network, key, lambda config, k=key, v=value: config.update({k: v}))
        if done != "refused" and _is_ours(network):
            found[done].add(key)
    assert found == OURS[network]


@pytest.mark.parametrize(("network", "key", "value"), OBEYED)
def test_what_is_obeyed(network: str, key: str, value: object) -> None:
    assert _compare(network, key, lambda config: config.update({key: value})) == "moved"
