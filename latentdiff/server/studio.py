"""What the routes share: the model, the queue, the limits, and the way from a body to a job."""

import asyncio
import base64
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fastapi import Request as HTTPRequest
from PIL.Image import Image
from starlette.concurrency import run_in_threadpool

from latentdiff import pictures
from latentdiff.diffusion.edits import Edit
from latentdiff.editing import Inpaint, Instruct, Region, RePaint, SDEdit, padded_size, picture_size
from latentdiff.editing.masks import open_mask, resize_mask
from latentdiff.errors import UserError
from latentdiff.guidance import methods
from latentdiff.guidance.from_text import check_text, file_of, second_pass
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.pipeline import LatentDiffusionPipeline, Request
from latentdiff.pipeline.arguments import MAX_SEED, latent_shape
from latentdiff.pipeline.prompt_syntax import parse
from latentdiff.pipeline.prompts import check_also, check_negatives, check_prompts
from latentdiff.server.jobs import Busy, Job, JobQueue
from latentdiff.solvers.aliases import resolve_both


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; all of it is checked before anything is made.

    Attributes:
        side: pixels of a side of a picture.
        steps: of one picture.
        pictures: of one request.
        body: bytes of a request.
        waiting: pictures that may wait in the queue.
    """

    side: int
    steps: int = 150
    pictures: int = 16
    body: int = 2**25
    waiting: int = 256


_MOST_PROMPTS = 9  # beside one another in a picture: of AND and `also`


@dataclass(frozen=True)
class Editing:
    """What is to be done to a client's picture.

    With a mask, its hole is painted; else all of the picture is drawn again.

    Attributes:
        read: opens the picture and the mask of what is to be painted, if any; called once, in a
            thread, when no other client's picture is being opened.
        strength: the more is changed the larger it is, in [0, 1]; None is the default.
        size: width and height to work at; by default the picture's, shrunk to the model's own.
        only_masked: work on the part around the hole alone, and put it back into the picture, which
            keeps its size; None does so where the picture is larger than the model's.
    """

    read: Callable[[], tuple[Image, Image | None]]
    strength: float | None = None
    size: tuple[int, int] | None = None
    only_masked: bool | None = False


class Refused(Exception):
    """A request that is not taken: its status, one line, and the name of what is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


@contextmanager
def refusing(param: str | None, prefix: str = "") -> Iterator[None]:
    """Refuse the request, by the name of its argument, where a `UserError` is raised."""
    try:
        yield
    except UserError as error:
        raise Refused(400, f"{prefix}{error}", param) from None


class Studio:
    """One model and its queue.

    Args:
        pipe: the model.
        limits: see `Limits`.
        at_once: pixels drawn in one batch.
        preview_vae: see `JobQueue`.
    """

    def __init__(
        self,
        pipe: LatentDiffusionPipeline,
        limits: Limits,
        at_once: int,
        preview_vae: Autoencoder | None = None,
    ) -> None:
        self.pipe = pipe
        self.limits = limits
        self.queue = JobQueue(pipe, at_once, limits.waiting, preview_vae=preview_vae)
        self._opening = asyncio.Semaphore(1)  # one client's large picture in memory at a time

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.pipe.bundle.name.rstrip("/").rpartition("/")[2]

    async def submit(
        self,
        request: Request,
        number: int,
        seed: int | None,
        *,
        preview_every: int = 0,
        editing: Editing | None = None,
    ) -> Job:
        """Check a request and put its pictures in the queue; picture i has the seed `seed + i`, or,
        where they are variations, all have one, and picture i the `variation_seed + i`.

        Without a seed, or with -1, the first is a fresh one.

        Raises:
            Refused: it asks for what there is not, for too much, or comes when too much waits.
        """
        within(number, "n", 1, self.limits.pictures)
        within(request.num_inference_steps, "steps", 1, self.limits.steps)
        check_words(request)
        second = second_pass(request.edits)
        within((second and second.steps) or 1, "steps of the second pass", 1, self.limits.steps)
        first = secrets.randbelow(2**32)
        if seed is not None and seed != -1:
            first = within(seed, "seed", 0, MAX_SEED)
        seeds = [(first + number) % (MAX_SEED + 1) for number in range(number)]
        if request.variation_strength:
            seeds = [first] * number  # of one picture
        if editing is None:
            return self._queued(Job(request, seeds, self._pixels(request, number), preview_every))
        async with self._opening:
            edited, region, held = await run_in_threadpool(self._edited, request, editing)
            pixels = self._pixels(edited, number)
            return self._queued(Job(edited, seeds, pixels, preview_every, region, held))

    def _queued(self, job: Job) -> Job:
        try:
            return self.queue.submit(job)
        except Busy:
            raise Refused(429, "too much is waiting: try again in a moment") from None

    def _pixels(self, request: Request, number: int) -> int:
        """Pixels of each picture as it is drawn, those of an edit's own picture where it has one;
        as often as there are prompts beside one another, for each of which the network draws.

        Raises:
            Refused: they are too many, or not of a size that can be drawn.
        """
        bundle, most = self.pipe.bundle, self.limits.side
        height, width = request.height or bundle.size[0], request.width or bundle.size[1]
        pictured = picture_size(request.edits, request.height, request.width)
        if pictured is not None:
            height, width = padded_size(pictured, bundle.factor)
        within(height, "height", bundle.factor, most)
        within(width, "width", bundle.factor, most)
        with refusing("size"):
            latent_shape(bundle, height, width, number)
        second = second_pass(request.edits)
        factor = 1.0 if second is None else second.factor
        if max(height, width) * factor > most:
            told = f"size: {max(height, width) * factor:g} pixels a side in the second pass"
            raise Refused(400, f"{told}; at most {most} are drawn", "size")
        return round(height * width * factor**2) * prompts_of(request)

    async def finished(self, job: Job, http: HTTPRequest) -> list[bytes]:
        """The PNG files of a job; it is cancelled when the client goes away.

        Raises:
            Refused: it failed, or was cancelled.
        """
        gone = asyncio.create_task(self._cancel_when_gone(job, http))
        try:
            async for _ in job.changes():
                pass
        finally:
            gone.cancel()
            self.queue.cancel(job)  # if this was left early
        if job.state == "cancelled":
            raise Refused(409, "the job was cancelled")
        if job.state == "failed":
            raise Refused(400, job.error or "drawing failed")
        return [picture for picture in job.pictures if picture is not None]

    async def _cancel_when_gone(self, job: Job, http: HTTPRequest) -> None:
        while not await http.is_disconnected():
            await asyncio.sleep(0.2)
        self.queue.cancel(job)

    def _edited(self, request: Request, editing: Editing) -> tuple[Request, Region | None, int]:
        """The request with the edit of a picture, the region that each result goes back into, and
        the pixels of the pictures that both hold.

        Raises:
            Refused: a picture is none, damaged or too large, or nothing is to be painted.
        """
        image, hole = editing.read()
        own = self.pipe.bundle.size
        size = editing.size
        region = None
        alone = editing.only_masked
        alone = max(image.size) > max(own) if alone is None else alone
        with refusing("mask"):
            if alone and hole is not None:
                region = Region.around(image, hole, own if size is None else (size[1], size[0]))
                small, hole = region.image, region.mask
            else:
                most = min(max(own), self.limits.side)
                small = pictures.fit(image, most) if size is None else image.resize(size)
                if hole is not None and hole.size != small.size:
                    hole = resize_mask(hole, small.size)
            edits = self._edits(small, hole, editing.strength)
        held = sum(one.width * one.height for one in (small, *([region.picture] if region else [])))
        asked = replace(request, edits=[*edits, *request.edits], height=None, width=None)
        return asked, region, held

    def _edits(self, image: Image, hole: Image | None, strength: float | None) -> list[Edit]:
        kind = self.pipe.bundle.kind
        if kind == "instruct-pix2pix":
            strength = 1.0 if strength is None else strength
            return [SDEdit(image, strength, 1, hole), Instruct(image)]
        if hole is None or strength not in (None, 1):
            return [SDEdit(image, 0.6 if strength is None else strength, 1, hole)]
        return [Inpaint(image, hole) if kind == "inpainting" else RePaint(image, hole)]


def check_words(request: Request) -> None:
    """Check the prompts, names and scales of a request, before anything that they name is made.

    Raises:
        Refused: a prompt is none, a name is unknown, a setting makes no sense, or a guide reads
            files: which a client may not name.
    """
    with refusing("prompt"):
        check_prompts([f"{request.prompt}"])
    with refusing("negative_prompt"):
        check_negatives(request.negative_prompt, 1)
    with refusing("solver"):
        resolve_both(
            request.solver if isinstance(request.solver, str) else None,
            request.timetable if isinstance(request.timetable, str) else None,
        )
    with refusing("guidance"):
        methods.check(
            request.guidance,
            scale=request.scale,
            rescale=request.guidance_rescale,
            interval=request.guidance_interval,
        )
    with refusing("also"):
        check_also(request.also)
    with refusing("prompt"):
        count = prompts_of(request)
    if count > _MOST_PROMPTS:
        told = f"prompt: {count} prompts beside one another; at most {_MOST_PROMPTS} are drawn"
        raise Refused(400, told, "prompt")
    for edit in request.edits:
        with refusing("edits"):
            name, path = check_text(f"{edit}")[0], file_of(f"{edit}")
        if name == "tiled":  # one call of the network becomes many
            raise Refused(400, f"edits: {name} is not for clients: ask for a larger size", "edits")
        if path is not None:
            told = f"edits: the guide {name!r} reads files of the server, which no client may name"
            raise Refused(400, told, "edits")


def prompts_of(request: Request) -> int:
    """How many prompts stand beside one another in a picture: those of AND, and `also`.

    Raises:
        UserError: the prompt cannot be read.
    """
    theirs = request.prompt_syntax == "a1111"
    return len(request.also) + (len(parse(f"{request.prompt}").parts) if theirs else 1)


def within(value: int, name: str, low: int, high: int) -> int:
    """Pass a number of a request.

    Raises:
        Refused: it is out of its range.
    """
    if not low <= value <= high:
        raise Refused(400, f"{name} must be from {low} to {high}, not {value}", name)
    return value


def open_image(data: bytes, param: str) -> Image:
    """A client's picture.

    Raises:
        Refused: it is none, damaged or too large.
    """
    with refusing(param, f"{param}: "):
        return pictures.open_picture(data)


def open_transparent(data: bytes, param: str, size: tuple[int, int]) -> Image | None:
    """The mask of what is transparent in a picture of a size; None if nothing is.

    Raises:
        Refused: it is no picture, or of another size.
    """
    with refusing(param, f"{param}: "):
        alpha = pictures.open_alpha(data)
    return alpha and _sized(alpha.point(lambda value: 255 - value), param, size)


def open_white(data: bytes, param: str, size: tuple[int, int]) -> Image:
    """The mask of what is white in a picture of a size.

    Raises:
        Refused: it is no picture, or of another size.
    """
    with refusing(param, f"{param}: "):
        mask = open_mask(data)
    return _sized(mask, param, size)


def _sized(mask: Image, param: str, size: tuple[int, int]) -> Image:
    if mask.size != size:
        told = "it is {} x {} pixels, but the picture {} x {}".format(*mask.size, *size)
        raise Refused(400, f"{param}: {told}", param)
    return mask


def data_of(text: str, param: str) -> bytes:
    """The bytes of base64, with or without `data:image/png;base64,` before it.

    Raises:
        Refused: it is not base64.
    """
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text)
    except ValueError:
        raise Refused(400, f"{param} is not base64", param) from None


def encoded(png: bytes) -> str:
    """A picture in base64."""
    return base64.b64encode(png).decode()
