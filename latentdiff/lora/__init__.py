"""LoRA: low-rank changes to a model's weights, trained, saved, loaded and mixed.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3.
"""

from latentdiff.lora.factors import Factors, Lora
from latentdiff.lora.file import (
    Layout,
    convert_lora,
    default_name,
    is_lora,
    load_lora,
    name_of,
    save_lora,
)
from latentdiff.lora.layers import (
    TARGETS,
    add_lora,
    attach_lora,
    detach_lora,
    fused,
    lora_names,
    lora_of,
    lora_scales,
    scale_loras,
)

__all__ = [
    "TARGETS",
    "Factors",
    "Layout",
    "Lora",
    "add_lora",
    "attach_lora",
    "convert_lora",
    "default_name",
    "detach_lora",
    "fused",
    "is_lora",
    "load_lora",
    "lora_names",
    "lora_of",
    "lora_scales",
    "name_of",
    "save_lora",
    "scale_loras",
]
