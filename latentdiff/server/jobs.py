"""Jobs of a server: one queue, and one thread that draws; what fits together is one batch."""

import asyncio
import secrets
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL.Image import Image

from latentdiff.editing import Region
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.pictures import encode_png
from latentdiff.pipeline import LatentDiffusionPipeline, Request
from latentdiff.pipeline.record import about_request, png_text
from latentdiff.pipeline.run import Run

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]


class Busy(Exception):
    """So much is waiting that no more is taken."""


@dataclass(eq=False)
class Job:
    """Pictures of one request. Read by any thread; written by the queue alone, but for
    `preview_every`.

    Attributes:
        request: of each of its pictures: one prompt, no seed; of variations the first one's.
        seeds: seed of each picture.
        pixels: of each of its pictures, as it is drawn, for each of its prompts.
        preview_every: number of steps between two previews; 0 is none.
        region: the part of a larger picture that is drawn, into which each result is put back.
        held: pixels of the client's pictures that it holds, until it is over.
        id: what a client calls it.
        state: where it is.
        pictures: PNG files, None for each that is not drawn yet.
        error: why it failed, in one line.
        told: warnings about its arguments, one line each, none twice.
        preview: PNG of the first picture as the network guesses it now.
        steps_done, steps: of all its pictures; `steps` is a guess before the first is begun.
    """

    request: Request
    seeds: Sequence[int]
    pixels: int
    preview_every: int = 0
    region: Region | None = None
    held: int = 0
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "waiting"
    pictures: list[bytes | None] = field(default_factory=list)
    error: str | None = None
    told: list[str] = field(default_factory=list)
    preview: bytes | None = None
    steps_done: int = 0
    steps: int = 0
    created: float = field(default_factory=time.time)
    _watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.pictures = [None] * len(self.seeds)
        self.steps = len(self.seeds) * self.request.num_inference_steps

    @property
    def over(self) -> bool:
        """Tell whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def fraction(self) -> float:
        """The part of its steps that is made, in [0, 1]."""
        return 1.0 if self.state == "done" else min(self.steps_done / max(self.steps, 1), 1.0)

    def variation_seed(self, number: int) -> int:
        """The seed that one of its pictures is turned towards, where they are variations."""
        first = self.request.variation_seed
        assert isinstance(first, int)
        return (first + number) % 2**64

    def warned(self, said: Sequence[warnings.WarningMessage]) -> None:
        """Tell warnings that came of it alone."""
        lines = dict.fromkeys([*self.told, *(f"{one.message}" for one in said)])
        self.told = list(lines)

    def end(self, state: State) -> None:
        """Leave it in a last state, without the client's pictures, which may be large."""
        own = [edit for edit in self.request.edits if isinstance(edit, str)]
        self.request, self.region, self.held = replace(self.request, edits=own), None, 0
        self.state = state

    def tell(self) -> None:
        """Wake everybody who follows it."""
        for loop, event in tuple(self._watchers):
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that loop is closed, and its watcher gone
                self._watchers.discard((loop, event))

    async def changes(self) -> AsyncIterator[None]:
        """Come back after each change, the first time at once, the last time when it is over."""
        watcher = asyncio.get_running_loop(), asyncio.Event()
        self._watchers.add(watcher)
        try:
            while True:
                watcher[1].clear()
                over = self.over
                yield
                if over:
                    return
                await watcher[1].wait()
        finally:
            self._watchers.discard(watcher)

    def fits(self, other: "Job") -> bool:
        """Tell whether pictures of both may be drawn in one batch."""
        if self is other:
            return True
        mine, theirs = self.request, other.request
        alone = replace(mine, prompt=theirs.prompt, negative_prompt=theirs.negative_prompt)
        fields = [getattr(alone, name) == getattr(theirs, name) for name in _COMPARED]
        # long prompts of a batch get as many chunks as the longest has: see `long_states`
        plain = not (mine.edits or theirs.edits or mine.reading.long)
        return plain and self.pixels == other.pixels and all(fields)


_DECODED = 256  # pixels along a side of a model whose previews are decoded: that takes little
_BETWEEN = 0.1  # seconds between two words about progress: a browser that shows it draws, too
_COMPARED = [name for name in Request.__dataclass_fields__ if name not in ("edits",)]
_Place = tuple[Job, int]


class JobQueue:
    """The jobs of a server, drawn in the order of their arrival.

    A picture depends on its own seed alone, not on what shares its batch, so requests of one shape
    are drawn together; those whose long prompts are read are not.

    Args:
        pipe: the model.
        at_once: pixels drawn in one batch.
        most_waiting: number of pictures that may wait.
        most_held: pixels of clients' pictures that waiting jobs may hold.
        most_kept: finished jobs that can still be asked for.
        most_bytes: of their pictures.
        preview_vae: decodes previews; without it the model's own does, or for a model of more than
            256 pixels along a side their colours are estimated.
    """

    def __init__(
        self,
        pipe: LatentDiffusionPipeline,
        at_once: int,
        most_waiting: int = 256,
        most_held: int = 2**27,
        most_kept: int = 100,
        most_bytes: int = 2**28,
        preview_vae: Autoencoder | None = None,
    ) -> None:
        self.pipe = pipe
        self.preview_vae = preview_vae
        self.at_once = at_once
        self.most_waiting = most_waiting
        self.most_held = most_held
        self.most_kept = most_kept
        self.most_bytes = most_bytes
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.batches = 0
        self._waiting: deque[_Place] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Put a job at the end of the queue.

        Raises:
            Busy: too many pictures are waiting, or the jobs that do hold too many pixels.
        """
        with self._changed:
            held = sum(other.held for other in self.jobs.values()) + job.held
            if len(self._waiting) + len(job.seeds) > self.most_waiting or held > self.most_held:
                raise Busy
            self.jobs[job.id] = job
            self._waiting.extend((job, number) for number in range(len(job.seeds)))
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """End a job; what is being drawn of it ends before its next step."""
        with self._changed:
            if job.over:
                return
            job.end("cancelled")
            self._waiting = deque(place for place in self._waiting if place[0] is not job)
            self._forget()
        job.tell()

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        for job in tuple(self.jobs.values()):
            self.cancel(job)
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while places := self._next():
            self.batches += 1
            self._attempt(places)

    def _next(self) -> list[_Place]:
        """The next batch, as soon as there is one; nothing when the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            first = self._waiting[0][0]
            most = max(1, self.at_once // first.pixels)
            batch = [place for place in self._waiting if first.fits(place[0])][:most]
            taken = {(id(job), number) for job, number in batch}
            self._waiting = deque(p for p in self._waiting if (id(p[0]), p[1]) not in taken)
            for job, _ in batch:
                job.state = "drawing"
        return batch

    def _attempt(self, places: Sequence[_Place]) -> None:
        """Draw a batch. If that of several jobs fails, each is drawn by itself: what is wrong with
        one ends no other, and is told to no other."""
        places = [place for place in places if not place[0].over]
        jobs = list(dict.fromkeys(job for job, _ in places))
        if not jobs:
            return
        counts = [(job, job.steps, job.steps_done) for job in jobs]
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                self._draw(jobs, places, said)
        except Exception as error:  # the thread must outlive a fault of one request
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            for job, steps, done in counts:
                job.steps, job.steps_done = steps, done
                self._attempt([place for place in places if place[0] is job])

    def _draw(
        self,
        jobs: Sequence[Job],
        places: Sequence[_Place],
        said: list[warnings.WarningMessage],
    ) -> None:
        """Draw a batch; `said` are the warnings of this thread, as they come."""
        run = self._prepare(jobs, places, said)
        told = 0.0
        for move in run.steps():
            live = [job for job in jobs if not job.over]
            if not live:
                run.cancel()
            for job in live:
                job.steps_done += sum(one is job for one, _ in places)
            watched = [j for j in live if j.preview_every and move.index % j.preview_every == 0]
            if watched:
                by = self.preview_vae
                quick = by is None and max(self.pipe.bundle.size) > _DECODED
                self._show(watched, places, run.preview(quick=quick, by=by))
            if watched or time.monotonic() - told >= _BETWEEN:
                told = time.monotonic()
                for job in live:
                    job.tell()
        if run.cancelled:
            return
        images = run.finish().images
        if len(jobs) == 1:
            jobs[0].warned(said)
        for (job, number), picture in zip(places, images, strict=True):
            self._keep(job, number, picture)

    def _prepare(
        self,
        jobs: Sequence[Job],
        places: Sequence[_Place],
        said: list[warnings.WarningMessage],
    ) -> Run:
        """The run of a batch. Where jobs share it, each is prepared by itself before, so that what
        is said of its words is told to it alone."""
        for job in jobs if len(jobs) > 1 else ():
            self.pipe.prepare(job.request)
            job.warned(said)
            said.clear()
        request = replace(
            jobs[0].request,
            prompt=[f"{job.request.prompt}" for job, _ in places],
            negative_prompt=[f"{job.request.negative_prompt or ''}" for job, _ in places],
            seed=[job.seeds[number] for job, number in places],
            variation_seed=None,
        )
        if request.variation_strength:
            varied = [job.variation_seed(number) for job, number in places]
            request = replace(request, variation_seed=varied)
        run = self.pipe.prepare(request)
        for job in jobs:
            count = sum(one is job for one, _ in places)
            job.steps += count * (len(run) - request.num_inference_steps)
        if len(jobs) == 1:
            jobs[0].warned(said)
        return run

    @staticmethod
    def _show(jobs: Sequence[Job], places: Sequence[_Place], pictures: object) -> None:
        assert isinstance(pictures, list)
        for job in jobs:
            place = next(i for i, (one, _) in enumerate(places) if one is job)
            job.preview = encode_png(pictures[place])

    def _keep(self, job: Job, number: int, picture: Image) -> None:
        request, region = job.request, job.region
        if job.over:
            return
        record = about_request(self.pipe.bundle, request)
        own: dict[str, object] = {"seed": job.seeds[number], "index": 0}
        if request.variation_strength:
            own["variation_seed"] = job.variation_seed(number)
        text = png_text(record, prompt=request.prompt, **own)
        data = encode_png(picture if region is None else region.paste(picture), text)
        with self._changed:
            if job.over:
                return
            job.pictures[number] = data
            if None not in job.pictures:
                job.end("done")
                self._forget()
        job.tell()

    def _fail(self, job: Job, error: Exception) -> None:
        message = "drawing failed"
        if isinstance(error, UserError):
            message = f"{error}"
        elif isinstance(error, MemoryError) or "memory" in f"{error}".lower():
            message = "too little memory for this"
        with self._changed:
            if not job.over:
                job.error = message
                job.end("failed")
            self._waiting = deque(place for place in self._waiting if place[0] is not job)
            self._forget()
        job.tell()

    def _forget(self) -> None:
        """Let go of the oldest jobs that are over, where there are too many."""
        over = [job for job in self.jobs.values() if job.over]
        held = sum(len(picture or b"") for job in over for picture in job.pictures)
        while over and (len(over) > self.most_kept or held > self.most_bytes):
            gone = over.pop(0)
            held -= sum(len(picture or b"") for picture in gone.pictures)
            del self.jobs[gone.id]
