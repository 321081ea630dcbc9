"""The run as an edit sees it, and pictures on their way into it and out again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, runtime_checkable

from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from latentdiff.diffusion.noise import NoiseStreams
from latentdiff.diffusion.process import Process
from latentdiff.diffusion.timetable import Timetable
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.network import LowResolution
from latentdiff.pictures import Picture, open_picture, to_tensor

Finish = Callable[[Tensor], Tensor]
"""Decoded pictures [B, 3, H, W] about [-1, 1] -> the same, corrected."""


@dataclass(frozen=True, slots=True, eq=False)
class RunContext:
    """One run, as the pipeline shows it to an edit.

    Attributes:
        height: height before the pictures are padded to a multiple of the autoencoder's factor.
        width: width before that padding.
        autoencoder: takes pictures in and out.
        prompts: the prompt of each of the B pictures; "" where ready-made states were given.
        process: the model's process; None outside a pipeline.
        native_size: height and width of the latents that the network was trained on; likewise.
        levels: the run's levels, before edits, for another number of steps; None outside a pipeline
            and where they were given one by one.
        low_resolution: of a network that enlarges small pictures, how those were made; likewise.
        noise: the streams of the B pictures, for noise that a run draws once; likewise.
    """

    height: int
    width: int
    autoencoder: Autoencoder
    prompts: Sequence[str] = ()
    process: Process | None = None
    native_size: tuple[int, int] | None = None
    levels: Callable[[int], Timetable] | None = None
    low_resolution: LowResolution | None = None
    noise: NoiseStreams | None = None

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width of the run itself: multiples of the factor."""
        return padded_size((self.height, self.width), self.autoencoder.factor)

    def pad(self, picture: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, C, *padded], the last row and column repeated."""
        height, width = self.padded
        extra = (0, width - picture.shape[-1], 0, height - picture.shape[-2])
        return pad(picture, extra, mode="replicate")

    def crop(self, pictures: Tensor) -> Tensor:
        """[B, C, *padded] -> [B, C, height, width]; enlarged ones in the same proportion."""
        height = round(self.height * pictures.shape[-2] / self.padded[0])
        width = round(self.width * pictures.shape[-1] / self.padded[1])
        return pictures[..., :height, :width]

    def latents(self, picture: Tensor) -> Tensor:
        """[B, 3, height, width] in [-1, 1] -> latents of the padded picture."""
        return self.autoencoder.encode(self.pad(picture))


def padded_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width, each raised to the next multiple of `factor`."""
    return -(-size[0] // factor) * factor, -(-size[1] // factor) * factor


@runtime_checkable
class HoldsPicture(Protocol):
    """An edit that may hold a picture where a run needs latents."""

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Height and width of the picture; None if the edit holds latents already."""
        ...


@runtime_checkable
class Binds(Protocol):
    """An edit that is made for one run, out of what it shall do in any."""

    def bind(self, context: RunContext) -> tuple[Self, Finish]:
        """The edit for this run, on latents; and what is to be done to the decoded pictures."""
        ...


Bound = TypeVar("Bound")


def bind(edits: Sequence[Bound], context: RunContext) -> tuple[list[Bound], Finish]:
    """Edits on latents, and all that they do to the decoded pictures, in their order."""
    bound: list[Bound] = []
    finishes: list[Finish] = []
    for edit in edits:
        if isinstance(edit, Binds):
            on_latents, finish = edit.bind(context)
            bound.append(on_latents)
            finishes.append(finish)
        else:
            bound.append(edit)

    def finish_all(pictures: Tensor) -> Tensor:
        for finish in finishes:
            pictures = finish(pictures)
        return pictures

    return bound, finish_all


def picture_size(
    edits: Sequence[object], height: int | None, width: int | None
) -> tuple[int, int] | None:
    """Height and width of the pictures that edits hold; None if none does.

    Raises:
        UserError: they differ among each other, or from the height and width that are wanted.
    """
    sizes = [edit.picture_size for edit in edits if isinstance(edit, HoldsPicture)]
    found = sorted({size for size in sizes if size is not None})
    if not found:
        return None
    listed = " and ".join(f"{w} x {h}" for h, w in found)
    if len(found) > 1:
        raise UserError(f"the pictures of one run must be of one size, not {listed}; resize them.")
    if (height or found[0][0], width or found[0][1]) != found[0]:
        raise UserError(
            f"the run is as large as its picture, {listed}: leave out height and width."
        )
    return found[0]


def unchanged(pictures: Tensor) -> Tensor:
    """The `Finish` that does nothing."""
    return pictures


def opened(image: Picture | Tensor) -> Image.Image | Tensor:
    """A picture decoded to RGB; latents as they are.

    Raises:
        UserError: it is no picture, or the latents are not [B, C, h, w].
    """
    if not isinstance(image, Tensor):
        return open_picture(image)
    if image.ndim != 4:
        raise UserError(
            f"a tensor is taken for latents [B, C, h, w], not {list(image.shape)}; give a picture "
            "as a file or a Pillow image."
        )
    return image


def pixels(image: Picture | Tensor) -> Tensor:
    """An opened picture as [1, 3, H, W] in [-1, 1]."""
    assert isinstance(image, Image.Image)
    return to_tensor(image)[None]


def size_of(image: Picture | Tensor) -> tuple[int, int] | None:
    """Height and width of an opened picture; None of latents."""
    return (image.height, image.width) if isinstance(image, Image.Image) else None


def latents_like(image: Picture | Tensor, x: Tensor) -> Tensor:
    """The latents that an edit holds, in the precision and on the device of x [B, C, H, W].

    Raises:
        UserError: it holds a picture that nobody has encoded, or latents of another shape.
    """
    if not isinstance(image, Tensor):
        raise UserError(
            "this edit holds a picture: hand it to the pipeline, or give it latents [B, C, h, w]."
        )
    if image.shape[1:] != x.shape[1:] or image.shape[0] not in (1, x.shape[0]):
        raise UserError(
            f"an edit holds latents {list(image.shape)}, but the run's are {list(x.shape)}."
        )
    return image.to(x)
