"""Our own calls: jobs with progress, previews and an end; what the page uses."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from latentdiff import solvers
from latentdiff.diffusion import timetable as timetables
from latentdiff.guidance.methods import default_scale
from latentdiff.pipeline import Request
from latentdiff.pipeline.prompt_syntax import Syntax
from latentdiff.server.jobs import Job
from latentdiff.server.studio import (
    Editing,
    Refused,
    Studio,
    data_of,
    encoded,
    open_image,
    open_white,
)
from latentdiff.version import __version__

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Wanted(BaseModel):
    """The body of `POST /jobs`, by the pipeline's own names.

    Pictures are base64, as they are or as `data:` addresses; the white of `mask` is painted;
    with `only_masked` at the model's size, and put back into the picture at its own.
    `replaces` is a job that is no longer wanted: whoever draws as somebody types names the last.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    negative_prompt: Annotated[str, Field(max_length=4000)] | None = None
    also: Annotated[list[str], Field(max_length=8)] = []
    prompt_weights: bool = False
    long_prompts: bool = False
    prompt_syntax: Syntax = "plain"
    clip_skip: Annotated[int, Field(ge=0, le=100)] | None = None
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance: str = "cfg"
    guidance_scale: Finite | None = None
    guidance_rescale: Finite = 0.0
    solver: str | None = None
    timetable: str | None = None
    edits: Annotated[list[str], Field(max_length=4)] = []
    seed: int | None = None
    image: str | None = None
    mask: str | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    only_masked: bool = False
    preview_every: Annotated[int, Field(ge=0)] = 0
    replaces: str | None = None

    def request(self, studio: Studio) -> Request:
        """The request of one of its pictures."""
        bundle = studio.pipe.bundle
        height, width = bundle.size
        steps, scale = bundle.settings(self.num_inference_steps, self.guidance, self.guidance_scale)
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            also=self.also,
            prompt_weights=self.prompt_weights,
            long_prompts=self.long_prompts,
            prompt_syntax=self.prompt_syntax,
            clip_skip=self.clip_skip,
            height=self.height or height,
            width=self.width or width,
            num_inference_steps=steps,
            guidance=self.guidance,
            guidance_scale=scale,
            guidance_rescale=self.guidance_rescale,
            solver=self.solver,
            timetable=self.timetable,
            edits=self.edits,
        )

    def editing(self) -> Editing | None:
        """What is to be done to its picture, if it has one.

        Raises:
            Refused: it says how, and has none.
        """
        image, mask = self.image, self.mask
        if image is None:
            if mask is not None or self.strength is not None or self.only_masked:
                told = "mask, strength and only_masked are for an image: give one"
                raise Refused(400, told, "image")
            return None
        if self.only_masked and mask is None:
            raise Refused(400, "only_masked is for a mask: give one", "mask")

        def read() -> tuple[Image, Image | None]:
            picture = open_image(data_of(image, "image"), "image")
            if mask is None:
                return picture, None
            return picture, open_white(data_of(mask, "mask"), "mask", picture.size)

        return Editing(read, self.strength, only_masked=self.only_masked)


def about(job: Job) -> dict[str, Any]:
    """Describe a job as it is now."""
    return {
        "id": job.id,
        "state": job.state,
        "progress": round(job.fraction, 4),
        "seeds": [f"{seed}" for seed in job.seeds],  # text: JavaScript's numbers end at 2^53
        "pictures": [
            f"/jobs/{job.id}/pictures/{number}.png"
            for number, picture in enumerate(job.pictures)
            if picture is not None
        ],
        "told": job.told,
        "error": job.error,
    }


def routes(studio: Studio) -> APIRouter:
    """Our routes to a studio."""
    router = APIRouter()
    _begin_and_end(router, studio)
    _follow(router, studio)
    return router


def _found(studio: Studio, job_id: str) -> Job:
    job = studio.queue.jobs.get(job_id)
    if job is None:
        raise Refused(404, "there is no such job, or it was too long ago")
    return job


def _begin_and_end(router: APIRouter, studio: Studio) -> None:
    @router.get("/model")
    async def model() -> dict[str, Any]:
        bundle, limits = studio.pipe.bundle, studio.limits
        height, width = bundle.size
        return {
            "name": studio.name,
            "about": bundle.about.replace(bundle.name, studio.name, 1),
            "kind": bundle.kind,
            "height": height,
            "width": width,
            "factor": bundle.factor,
            "num_inference_steps": bundle.num_inference_steps,
            "guidance_scale": bundle.guidance_scale or default_scale("cfg"),
            "solvers": solvers.names(),
            "timetables": timetables.names(),
            "limits": {"side": limits.side, "steps": limits.steps, "pictures": limits.pictures},
            "version": __version__,
        }

    @router.post("/jobs", status_code=201)
    async def begin(wanted: Wanted) -> dict[str, Any]:
        request, editing = wanted.request(studio), wanted.editing()
        if wanted.replaces in studio.queue.jobs:
            studio.queue.cancel(studio.queue.jobs[wanted.replaces])
        job = await studio.submit(
            request,
            wanted.num_images,
            wanted.seed,
            preview_every=wanted.preview_every,
            editing=editing,
        )
        return about(job)

    @router.delete("/jobs/{job_id}")
    async def cancel(job_id: str) -> dict[str, Any]:
        job = _found(studio, job_id)
        studio.queue.cancel(job)
        return about(job)


def _follow(router: APIRouter, studio: Studio) -> None:
    @router.get("/jobs/{job_id}")
    async def look(job_id: str) -> dict[str, Any]:
        return about(_found(studio, job_id))

    @router.get("/jobs/{job_id}/events")
    async def events(job_id: str) -> StreamingResponse:
        """Server-sent events: the job after each change; with a preview where it has a new one."""
        job = _found(studio, job_id)

        async def told() -> AsyncIterator[str]:
            last, shown = None, None
            async for _ in job.changes():
                now, preview = about(job), job.preview
                if now == last and preview is shown:
                    continue
                last = dict(now)
                if preview is not shown and preview is not None:
                    now["preview"] = f"data:image/png;base64,{encoded(preview)}"
                shown = preview
                yield f"data: {json.dumps(now)}\n\n"

        return StreamingResponse(
            told(), media_type="text/event-stream", headers={"cache-control": "no-store"}
        )

    @router.get("/jobs/{job_id}/pictures/{number}.png")
    async def picture(job_id: str, number: int) -> Response:
        pictures = _found(studio, job_id).pictures
        if not 0 <= number < len(pictures) or pictures[number] is None:
            raise Refused(404, "there is no such picture, or not yet")
        return Response(pictures[number], media_type="image/png")
