"""What a fine-tune leaves: the LoRA file or the learned words, and a model folder."""

import torch

from latentdiff.bundle import Bundle
from latentdiff.bundle.save import save_tensors
from latentdiff.learning.finetuning import FinetuneConfig
from latentdiff.learning.words import learned_rows, with_learned_words
from latentdiff.lora import lora_of, save_lora

LORA_FILE = "pytorch_lora_weights.safetensors"
WORDS_FILE = "learned_embeds.safetensors"


def save_outcome(bundle: Bundle, config: FinetuneConfig) -> list[str]:
    """Write it into `config.out`; returns lines that say what it is and how to use it.

    Raises:
        UserError: it cannot be written.
    """
    out = config.out
    dtype = getattr(torch, config.save_dtype)
    base = "" if config.model is None else f" --model {config.model}"
    if config.method == "lora":
        path = save_lora(lora_of(bundle), out / LORA_FILE)
        return [f"wrote {path}", f'latentdiff generate "..." --lora {path}{base}']
    if config.method == "textual-inversion":
        save_tensors(learned_rows(bundle, config.inversion.tokens), out / WORDS_FILE, {})
        bundle = with_learned_words(bundle)
    bundle.save(out / "model", dtype=dtype)
    return [f"wrote {out / 'model'}", f'latentdiff generate "..." --model {out / "model"}']
