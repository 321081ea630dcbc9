"""A small CLIP of one's own: an image and a text tower out of transformers."""

from transformers.models.clip.configuration_clip import CLIPConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from latentdiff.models.fresh_text import build_text_encoder


def build_clip(
    tokenizer: CLIPTokenizer,
    *,
    image_size: int,
    patch: int,
    width: int,
    layers: int,
    text_layers: int,
    heads: int,
) -> CLIPModel:
    """A fresh CLIP (Radford et al. 2021) whose towers and common space are `width` wide.

    Args:
        tokenizer: tokenizer of the texts.
        image_size: side of the pictures in pixels.
        patch: side of a patch in pixels.
        width: width of both towers.
        layers: number of layers of the image tower.
        text_layers: number of layers of the text tower.
        heads: attention heads of both.
    """
    text = build_text_encoder(tokenizer, width, text_layers, heads).config
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch,
    )
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
