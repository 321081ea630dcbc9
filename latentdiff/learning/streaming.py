"""Stage 2 on shards that are too many for the disk: nothing is made in advance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.data.examples import load_picture
from latentdiff.data.stream import ShardStream
from latentdiff.learning.batches import to_range
from latentdiff.learning.order import Stream, generator
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.conditioner import Conditioner
from latentdiff.models.text_encoders import Tokens


class StreamedMoments:
    """Mean and std of the raw latents of samples, [B, 2C, h, w] float32 on the CPU."""

    def __init__(self, autoencoder: Autoencoder, stream: ShardStream, size: int) -> None:
        self.autoencoder = autoencoder
        self.stream = stream
        self.size = size

    @torch.no_grad()
    def __getitem__(self, samples: Sequence[int]) -> Tensor:
        """Fetched, decoded and encoded now.

        Raises:
            UserError: a shard cannot be fetched, or a picture not be decoded.
        """
        pictures = torch.stack([load_picture(self.stream[n], self.size) for n in samples])
        return self.autoencoder.moments(to_range(pictures)).cpu()


class StreamedCaptions:
    """The choice among captions that `Captions` makes, tokenized when it is made."""

    def __init__(
        self, conditioner: Conditioner, stream: ShardStream, dropout: float, seed: int
    ) -> None:
        self.conditioner = conditioner
        self.stream = stream
        self.dropout = dropout
        self.seed = seed

    def tokens(self, step: int, places: list[int], samples: list[int]) -> Tokens:
        """One caption for each sample, or the empty one with probability `dropout`."""
        chosen: list[str] = []
        for place, sample in zip(places, samples, strict=True):
            random = generator(self.seed, Stream.CAPTION, step, place)
            dropped = random.random() < self.dropout
            captions = self.stream[sample].captions
            caption = captions[random.integers(len(captions))]
            chosen.append("" if dropped else caption)
        return self.conditioner.tokenize(chosen)
