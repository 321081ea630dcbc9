"""Captions as a fine-tune reads them: tags in another order, and the words of a style apart."""

from collections.abc import Sequence

from latentdiff.errors import UserError
from latentdiff.learning.finetune_config import CaptionsConfig
from latentdiff.learning.order import Stream, generator

_VARIANTS = 8  # of a caption whose tags are shuffled or dropped


def varied(
    captions: Sequence[str], config: CaptionsConfig, seed: int, number: int
) -> tuple[str, ...]:
    """The captions of a sample in eight variants each, where their tags are shuffled or dropped.

    Tags stand between commas. The first `config.keep` and the style's words stay where they are.

    Args:
        number: of the sample; the variants are a function of (seed, number).
    """
    if not (config.shuffle or config.drop):
        return tuple(captions)
    found: list[str] = []
    for place, caption in enumerate(captions):
        content, style = apart(caption, config.style) or (caption, "")
        tags = [tag.strip() for tag in content.split(",")]
        kept, rest = tags[: config.keep], tags[config.keep :]
        random = generator(seed, Stream.TAGS, number, place)
        for _ in range(_VARIANTS):
            order = random.permutation(len(rest)) if config.shuffle else range(len(rest))
            left = [rest[int(n)] for n in order if random.random() >= config.drop]
            found.append(", ".join([*kept, *left, *([style] if style else [])]))
    return tuple(dict.fromkeys(caption for caption in found if caption)) or tuple(captions)


def apart(caption: str, style: str | None) -> tuple[str, str] | None:
    """A caption's content and its style's words, where it ends in these; else None."""
    if not style or not caption.endswith(style):
        return None
    content = caption[: -len(style)].rstrip(" ,")
    return (content, style) if content else None


def check_style(captions: Sequence[str], style: str | None) -> None:
    """Pass if some captions end in the words of the style, or none are named.

    Raises:
        UserError: none does.
    """
    if style and not any(apart(caption, style) for caption in captions):
        raise UserError(f"no caption is something followed by {style!r}: captions.style")
