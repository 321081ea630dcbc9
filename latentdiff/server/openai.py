"""OpenAI's image calls: `/v1/images/generations`, `/v1/images/edits`, `/v1/models`."""

import re
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, UploadFile
from fastapi import Request as HTTPRequest
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from latentdiff.pipeline import Request
from latentdiff.server.studio import (
    Editing,
    Refused,
    Studio,
    encoded,
    open_image,
    open_transparent,
)

Quality = Literal["auto", "standard", "low", "medium", "high", "hd"]
STEPS: dict[str, int] = {"low": 10, "high": 40, "hd": 40}  # 20 for the others
Prompt = Annotated[str, Field(min_length=1, max_length=4000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Generation(BaseModel):
    """The body of `/v1/images/generations`; what OpenAI does not have stands below the line."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    model: str | None = None
    n: int = 1
    size: str | None = None
    quality: Quality = "auto"
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] = "png"
    background: Literal["auto", "opaque"] | None = None
    moderation: str | None = None  # there is none, whatever is asked
    user: str | None = None  # kept nowhere
    stream: Literal[False] | None = None
    # ours
    seed: int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: Finite | None = None
    solver: str | None = None
    timetable: str | None = None

    def request(self, studio: Studio) -> Request:
        """The request of one of its pictures.

        Raises:
            Refused: another model is meant, or the size is none.
        """
        if self.model:
            check_model(self.model, studio)
        width, height = read_size(self.size)
        bundle = studio.pipe.bundle
        steps = self.steps or STEPS.get(self.quality)
        steps, scale = bundle.settings(steps, "cfg", self.guidance_scale)
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=steps,
            guidance_scale=scale,
            solver=self.solver,
            timetable=self.timetable,
            height=height or bundle.size[0],
            width=width or bundle.size[1],
        )


class Edit(Generation):
    """The form of `/v1/images/edits`: what is transparent in a mask or picture is painted."""

    image: UploadFile
    mask: UploadFile | None = None
    input_fidelity: Literal["low", "high"] | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None


def check_model(name: str, studio: Studio) -> None:
    """Pass the name of the model that is here.

    Raises:
        Refused: it is another's.
    """
    if name != studio.name:
        raise Refused(404, f"there is no model {name!r:.80} here, but {studio.name}", "model")


def read_size(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of "512x512"; None and None of "auto".

    Raises:
        Refused: it is neither.
    """
    if text in (None, "", "auto"):
        return None, None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise Refused(400, "size must be as 512x512, or auto", "size")
    return int(found[1]), int(found[2])


def routes(studio: Studio) -> APIRouter:
    """OpenAI's routes to a studio."""
    router = APIRouter(prefix="/v1")
    model = {"id": studio.name, "object": "model", "created": 0, "owned_by": "latentdiff"}

    async def answer(
        asked: Generation, request: Request, http: HTTPRequest, editing: Editing | None = None
    ) -> dict[str, Any]:
        job = await studio.submit(request, asked.n, asked.seed, editing=editing)
        pictures = await studio.finished(job, http)
        base = f"{http.base_url}jobs/{job.id}/pictures"
        data = [
            {"url": f"{base}/{i}.png"}
            if asked.response_format == "url"
            else {"b64_json": encoded(png)}
            for i, png in enumerate(pictures)
        ]
        return {"created": int(time.time()), "data": data, "output_format": "png"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        check_model(name, studio)
        return model

    @router.post("/images/generations")
    async def generations(asked: Generation, http: HTTPRequest) -> dict[str, Any]:
        return await answer(asked, asked.request(studio), http)

    @router.post("/images/edits")
    async def edits(
        asked: Annotated[Edit, Form(media_type="multipart/form-data")], http: HTTPRequest
    ) -> dict[str, Any]:
        data = await asked.image.read()
        marked = None if asked.mask is None else await asked.mask.read()

        def read() -> tuple[Image, Image | None]:
            picture = open_image(data, "image")
            own = "{}x{}".format(*picture.size)
            if asked.size not in (None, "", "auto", own):
                raise Refused(400, f"size: the picture is {own}; leave it out", "size")
            if marked is None:
                return picture, open_transparent(data, "image", picture.size)
            hole = open_transparent(marked, "mask", picture.size)
            if hole is None:
                raise Refused(400, "mask: no part of it is transparent, to be painted", "mask")
            return picture, hole

        request = asked.model_copy(update={"size": None}).request(studio)
        editing = Editing(read, asked.strength, only_masked=None)
        return await answer(asked, request, http, editing)

    return router
