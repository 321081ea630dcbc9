"""A folder of captioned pictures as a model sees it: latents and text states, made once."""

from pathlib import Path

from torch import Tensor

from latentdiff.bundle import Bundle
from latentdiff.errors import UserError
from latentdiff.learning.batches import encode_pictures, sample_order, split_examples
from latentdiff.learning.captions import Captions, CaptionStates
from latentdiff.learning.config import DataConfig
from latentdiff.learning.order import sample_noise
from latentdiff.learning.run import Run
from latentdiff.models.text_encoders import TextStates


class CaptionedLatents:
    """Latents and text states of a folder, by a model's frozen autoencoder and text encoder.

    Args:
        bundle: the model.
        data: the pictures.
        run: where what is made is kept, in `cache`.
        dropout: the share of the captions that are left out.

    Attributes:
        examples: the pictures that are learned.
        order: the order in which they come.
        shape: of the latents of one [C, h, w].

    Raises:
        UserError: a picture or the cache cannot be read or written.
    """

    def __init__(self, bundle: Bundle, data: DataConfig, run: Run, dropout: float = 0.0) -> None:
        self.seed = run.config.seed
        self.bundle = bundle
        self.examples = split_examples(data)[0]
        self.order = sample_order(self.examples, data, self.seed)
        run.say(f"{len(self.examples)} pictures; the model: {bundle.about}")
        cache: Path = run.out / "cache"
        self.moments = encode_pictures(
            bundle.autoencoder, self.examples, data.size, data.latents or cache, run.accelerator
        )
        self.shape = self.moments.shape[1] // 2, *self.moments.shape[2:]
        texts = [example.captions for example in self.examples]
        captions = Captions(bundle.conditioner, texts, dropout, self.seed)
        run.say(*captions.warnings())
        self.states = CaptionStates(captions, bundle.conditioner, cache)

    def draw(
        self, step: int, places: list[int], samples: list[int], draws: int
    ) -> tuple[Tensor, Tensor, TextStates]:
        """Latents of some samples, noise to train with, and the states of a caption of each.

        Args:
            step, places, samples: which samples they are: see `learning.order.columns`.
            draws: of the noise.

        Returns:
            x_0 [B, C, h, w], standard normal noise [draws, B, C, h, w], both on the model's device,
            and the states of the captions.
        """
        moments = self.moments[samples].to(self.bundle.device)
        noise = sample_noise(self.seed, step, places, self.shape, draws + 1).to(moments)
        latents = self.bundle.autoencoder.draw(moments, noise[0])
        return latents, noise[1:], self.states.of(step, places, samples)


def check_size(size: int, bundle: Bundle) -> None:
    """Pass if a model draws pictures of `data.size`.

    Raises:
        UserError: it is no multiple of what the model needs.
    """
    unit = bundle.factor * bundle.network.multiple
    if size % unit:
        raise UserError(f"data.size={size} is no multiple of {unit}, as the model needs")
