"""What the routes share: the model, the queue, the limits, and the way from a body to a job."""

import asyncio
import base64
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request as HTTPRequest
from PIL.Image import Image
from starlette.concurrency import run_in_threadpool

from latentdiff import pictures
from latentdiff.diffusion.edits import Edit
from latentdiff.editing import Inpaint, Instruct, Region, RePaint, SDEdit
from latentdiff.editing.masks import open_mask, resize_mask
from latentdiff.errors import UserError
from latentdiff.guidance import methods
from latentdiff.guidance.from_text import check_text
from latentdiff.pipeline import LatentDiffusionPipeline, Request
from latentdiff.pipeline.arguments import MAX_SEED, latent_shape
from latentdiff.pipeline.prompts import check_also, check_negatives, check_prompts
from latentdiff.server.jobs import Busy, Job, JobQueue
from latentdiff.solvers.aliases import resolve_both

Finish = Callable[[Image], Image]
_T = TypeVar("_T")


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


class Refused(Exception):
    """A request that is not taken: its status, one line, and the name of what is wrong."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class Studio:
    """One model and its queue.

    Args:
        pipe: the model.
        limits: see `Limits`.
        at_once: pixels drawn in one batch.
    """

    def __init__(self, pipe: LatentDiffusionPipeline, limits: Limits, at_once: int) -> None:
        self.pipe = pipe
        self.limits = limits
        self.queue = JobQueue(pipe, at_once, limits.waiting)
        self._decoding = asyncio.Semaphore(1)  # one large picture in memory at a time

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.pipe.bundle.name.rstrip("/").rpartition("/")[2]

    def submit(
        self,
        request: Request,
        number: int,
        seed: int | None,
        *,
        preview_every: int = 0,
        finish: Finish | None = None,
    ) -> Job:
        """Check a request and put its pictures in the queue; picture i has the seed `seed + i`.

        Without a seed, or with -1, the first is a fresh one.

        Raises:
            Refused: it asks for what there is not, for too much, or comes when too much waits.
        """
        limits, bundle = self.limits, self.pipe.bundle
        within(number, "n", 1, limits.pictures)
        within(request.num_inference_steps, "steps", 1, limits.steps)
        for name, side in (("height", request.height), ("width", request.width)):
            within(bundle.factor if side is None else side, name, bundle.factor, limits.side)
        try:
            check_prompts([f"{request.prompt}"])
            check_negatives(request.negative_prompt, 1)
            latent_shape(bundle, request.height, request.width, number)
            check_names(request)
        except UserError as error:
            raise Refused(400, f"{error}", f"{error}".partition(":")[0].split()[-1]) from None
        fresh = seed in (None, -1)
        first = secrets.randbelow(2**32) if fresh else within(seed, "seed", 0, MAX_SEED)
        seeds = [(first + number) % (MAX_SEED + 1) for number in range(number)]
        try:
            return self.queue.submit(Job(request, seeds, preview_every, finish))
        except Busy:
            raise Refused(429, "too many pictures are waiting: try again in a moment") from None

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

    async def picture(self, data: bytes, param: str) -> Image:
        """A client's picture.

        Raises:
            Refused: it is none, damaged or too large.
        """
        return await self._decoded(param, pictures.open_picture, data)

    async def transparent(self, data: bytes, param: str, size: tuple[int, int]) -> Image | None:
        """The mask of what is transparent in a picture of a size; None if nothing is.

        Raises:
            Refused: it is no picture, or of another size.
        """
        alpha = await self._decoded(param, pictures.open_alpha, data)
        if alpha is None:
            return None
        return self._sized(alpha.point(lambda value: 255 - value), param, size)

    async def white(self, data: bytes, param: str, size: tuple[int, int]) -> Image:
        """The mask of what is white in a picture of a size.

        Raises:
            Refused: it is no picture, or of another size.
        """
        return self._sized(await self._decoded(param, open_mask, data), param, size)

    @staticmethod
    def _sized(mask: Image, param: str, size: tuple[int, int]) -> Image:
        if mask.size != size:
            told = "it is {} x {} pixels, but the picture {} x {}".format(*mask.size, *size)
            raise Refused(400, f"{param}: {told}", param)
        return mask

    async def _decoded(self, param: str, decode: Callable[[bytes], _T], data: bytes) -> _T:
        async with self._decoding:
            try:
                return await run_in_threadpool(decode, data)
            except UserError as error:
                raise Refused(400, f"{param}: {error}", param) from None

    async def edited(
        self,
        request: Request,
        image: Image,
        hole: Image | None,
        strength: float | None,
        *,
        size: tuple[int, int] | None = None,
        only_masked: bool = False,
    ) -> tuple[Request, Finish | None]:
        """The request with an edit of a picture, and what is to be done to each result.

        With a hole, that is painted; else all of the picture is drawn again, and the more of it
        changes the larger `strength` is, in [0, 1].

        Args:
            size: width and height to work at; by default the picture's, shrunk to the model's own.
            only_masked: work on the part around the hole alone, and put it back into the picture,
                which keeps its size.

        Raises:
            Refused: nothing is to be painted.
        """
        own = self.pipe.bundle.size
        try:
            if only_masked and hole is not None:
                region = await run_in_threadpool(Region.around, image, hole, own)
                edits = self._edits(region.image, region.mask, strength)
                finish = region.paste
            else:
                small = pictures.fit(image, max(own)) if size is None else image.resize(size)
                if hole is not None and hole.size != small.size:
                    hole = resize_mask(hole, small.size)
                edits, finish = self._edits(small, hole, strength), None
        except UserError as error:
            raise Refused(400, f"{error}", "mask") from None
        asked = replace(request, edits=[*edits, *request.edits], height=None, width=None)
        return asked, finish

    def _edits(self, image: Image, hole: Image | None, strength: float | None) -> list[Edit]:
        kind = self.pipe.bundle.kind
        if kind == "instruct-pix2pix":
            strength = 1.0 if strength is None else strength
            return [SDEdit(image, strength, 1, hole), Instruct(image)]
        if hole is None or strength not in (None, 1):
            return [SDEdit(image, 0.6 if strength is None else strength, 1, hole)]
        return [Inpaint(image, hole) if kind == "inpainting" else RePaint(image, hole)]


def check_names(request: Request) -> None:
    """Check the names and scales of a request, as the command line does before it loads a model.

    Raises:
        UserError: a name is unknown, or a setting makes no sense.
    """
    resolve_both(
        request.solver if isinstance(request.solver, str) else None,
        request.timetable if isinstance(request.timetable, str) else None,
    )
    methods.check(
        request.guidance,
        scale=request.scale,
        rescale=request.guidance_rescale,
        interval=request.guidance_interval,
    )
    check_also(request.also)
    for edit in request.edits:
        if isinstance(edit, str):
            check_text(edit)


def within(value: int, name: str, low: int, high: int) -> int:
    """Pass a number of a request.

    Raises:
        Refused: it is out of its range.
    """
    if not low <= value <= high:
        raise Refused(400, f"{name} must be from {low} to {high}, not {value}", name)
    return value


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
