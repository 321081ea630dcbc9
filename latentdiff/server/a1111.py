"""A1111's calls, as clients of its web UI make them: `/sdapi/v1/txt2img` and the like."""

import json
import secrets
import time
from typing import Annotated, Any, Literal
from weakref import WeakSet

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from PIL import ImageFilter, ImageOps
from PIL.Image import Image
from pydantic import BaseModel, ConfigDict, Field

from latentdiff import solvers
from latentdiff.diffusion import timetable as timetables
from latentdiff.guidance.from_text import check_text
from latentdiff.models.text_encoders import ClipTower
from latentdiff.pipeline import Request
from latentdiff.pipeline.arguments import MAX_SEED
from latentdiff.server.jobs import Job
from latentdiff.server.studio import (
    Editing,
    Refused,
    Studio,
    data_of,
    encoded,
    open_image,
    open_white,
    refusing,
    within,
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
UPSCALER = "Bicubic"
"""What enlarges a picture between two passes: its pixels, not its latents."""
_PREVIEWED = 5  # steps from one preview to the next

# Arguments that clients send with every call, by the values that ask for nothing. Another value is
# refused by the argument's name.
NOTHING: dict[str, tuple[object, ...]] = {
    "alwayson_scripts": ({},),
    "comments": ({},),
    "disable_extra_networks": (False, True),
    "do_not_save_grid": (False, True),
    "do_not_save_samples": (False, True),
    "eta": (0, 1),
    "firstphase_height": (0,),
    "firstphase_width": (0,),
    "force_task_id": ("",),
    "image_cfg_scale": (0, 1.5),
    "include_init_images": (False, True),
    "infotext": ("",),
    "initial_noise_multiplier": (0, 1),
    "inpaint_full_res_padding": (0, 32),
    "inpainting_fill": (0, 1),
    "mask_round": (True,),
    "override_settings_restore_afterwards": (False, True),
    "refiner_checkpoint": ("",),
    "refiner_switch_at": (0, 1),
    "resize_mode": (0,),
    "restore_faces": (False,),
    "s_churn": (0,),
    "s_min_uncond": (0,),
    "s_noise": (1,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "save_images": (False,),
    "script_args": ([],),
    "script_name": ("",),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "send_images": (True,),
    "styles": ([],),
    "tiling": (False,),
}
# Those of the second pass, which mean nothing without it.
NOTHING_OF_HIRES: dict[str, tuple[object, ...]] = {
    "hr_cfg": (1,),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_negative_prompt": ("",),
    "hr_prompt": ("",),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_upscaler": (UPSCALER,),
}


class TextToImage(BaseModel):
    """The body of `/sdapi/v1/txt2img`: what is obeyed. The rest goes through `NOTHING`."""

    model_config = ConfigDict(extra="allow")

    prompt: Annotated[str, Field(max_length=4000)] = ""
    negative_prompt: Annotated[str, Field(max_length=4000)] = ""
    seed: int = -1
    steps: int | None = None
    cfg_scale: Finite | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 1
    n_iter: int = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    override_settings: dict[str, Any] | None = None
    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = None
    enable_hr: bool = False
    hr_scale: Finite = 2.0
    hr_second_pass_steps: int = 0
    subseed: int = -1
    subseed_strength: Annotated[float, Field(ge=0, le=1)] = 0.0

    def request(self, studio: Studio) -> Request:
        """The request of one of its pictures.

        Raises:
            Refused: it asks for what there is not.
        """
        nothing = NOTHING | (NOTHING_OF_HIRES if self.enable_hr else {})
        for name, value in (self.model_extra or {}).items():
            if value is None or (name.startswith("hr_") and not self.enable_hr):
                continue
            if name not in nothing or value not in nothing[name]:
                raise Refused(
                    422, f"{name}: {value!r:.80} is not to be had here: leave it out", name
                )
        check_options(studio, self.override_settings or {})
        bundle = studio.pipe.bundle
        towers = bundle.conditioner.towers.values()
        readable = all(isinstance(tower, ClipTower) for tower in towers)  # others read no chunks
        steps, scale = bundle.settings(self.steps, "cfg", self.cfg_scale)
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt or None,
            prompt_syntax="a1111" if readable else "plain",
            num_inference_steps=steps,
            guidance_scale=7.0 if scale is None else scale,  # that is A1111's own
            solver=self.sampler_name or self.sampler_index or None,
            timetable=self.scheduler or None,
            height=self.height or bundle.size[0],
            width=self.width or bundle.size[1],
            edits=self.second_pass(studio.limits.steps, steps),
            variation_seed=self._subseed() if self.subseed_strength else None,
            variation_strength=self.subseed_strength,
        )

    def second_pass(self, most: int, first: int) -> list[str]:
        """The edit that draws again what is enlarged, of at most so many steps, by default as many
        as the first pass; none without `enable_hr`.

        Raises:
            Refused: a number is out of its range.
        """
        if not self.enable_hr:
            return []
        steps = within(self.hr_second_pass_steps, "hr_second_pass_steps", 0, most) or first
        strength = 0.75 if self.denoising_strength is None else self.denoising_strength
        text = f"hires:{self.hr_scale}:{strength}:{steps}"
        with refusing("enable_hr"):
            check_text(text)
        return [text]

    def _subseed(self) -> int:
        drawn = secrets.randbelow(2**32)
        return drawn if self.subseed == -1 else within(self.subseed, "subseed", 0, MAX_SEED)

    @property
    def number(self) -> int:
        """How many pictures it asks for."""
        return within(self.batch_size, "batch_size", 1, 64) * within(self.n_iter, "n_iter", 1, 64)


class ImageToImage(TextToImage):
    """The body of `/sdapi/v1/img2img`."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    mask: str | None = None
    mask_blur: Annotated[float, Field(ge=0, le=64)] = 4
    inpainting_mask_invert: Literal[0, 1] = 0
    inpaint_full_res: bool = False

    def editing(self, studio: Studio) -> Editing:
        """What is to be done to its picture.

        Raises:
            Refused: it names one of width and height, or a size that is too large.
        """
        if self.enable_hr:
            raise Refused(
                422, "enable_hr: is not to be had for a picture: leave it out", "enable_hr"
            )
        size = None
        if self.width or self.height:
            if not (self.width and self.height):
                raise Refused(422, "width and height: give both, or neither", "width")
            most = studio.limits.side
            size = within(self.width, "width", 8, most), within(self.height, "height", 8, most)

        def read() -> tuple[Image, Image | None]:
            image = open_image(data_of(self.init_images[0], "init_images"), "init_images")
            if not self.mask:
                return image, None
            hole = open_white(data_of(self.mask, "mask"), "mask", image.size)
            hole = ImageOps.invert(hole) if self.inpainting_mask_invert else hole
            return image, hole.filter(ImageFilter.GaussianBlur(self.mask_blur))

        strength = 0.75 if self.denoising_strength is None else self.denoising_strength
        return Editing(read, strength, size, self.inpaint_full_res)


class Options(BaseModel):
    """The body of `/sdapi/v1/options`."""

    model_config = ConfigDict(extra="allow")


def check_options(studio: Studio, wanted: dict[str, Any]) -> None:
    """Pass options that are as they are wanted already.

    Raises:
        Refused: one is another, or there is no such option.
    """
    have = options_of(studio)
    for name, value in wanted.items():
        if name not in have or have[name] != value:
            raise Refused(422, f"{name}: this server has no such option to set", name)


def options_of(studio: Studio) -> dict[str, Any]:
    """The options that clients read, as they are here."""
    return {
        "sd_model_checkpoint": studio.name,
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
    }


def routes(studio: Studio) -> APIRouter:
    """A1111's routes to a studio."""
    router = APIRouter(prefix="/sdapi/v1")
    jobs: WeakSet[Job] = WeakSet()  # of these routes: nobody else's are watched or ended by them
    _draw(router, studio, jobs)
    _watch(router, studio, jobs)
    _describe(router, studio)
    return router


def _draw(router: APIRouter, studio: Studio, jobs: WeakSet[Job]) -> None:
    async def answer(
        asked: TextToImage, http: HTTPRequest, editing: Editing | None = None
    ) -> dict[str, Any]:
        seed = None if asked.seed == -1 else asked.seed
        job = await studio.submit(asked.request(studio), asked.number, seed, editing=editing)
        jobs.add(job)
        pictures = await studio.finished(job, http)
        info = {
            "prompt": asked.prompt,
            "negative_prompt": asked.negative_prompt,
            "seed": job.seeds[0],
            "all_seeds": list(job.seeds),
            "steps": job.request.num_inference_steps,
            "cfg_scale": job.request.guidance_scale,
            "sampler_name": asked.sampler_name,
            "sd_model_name": studio.name,
        }
        if asked.subseed_strength:
            subseeds = [job.variation_seed(number) for number in range(len(job.seeds))]
            info |= {"subseed": subseeds[0], "all_subseeds": subseeds}
            info["subseed_strength"] = asked.subseed_strength
        sent = asked.model_dump(exclude={"init_images", "mask"})
        return {
            "images": [encoded(png) for png in pictures],
            "parameters": sent,
            "info": json.dumps(info),
        }

    @router.post("/txt2img")
    async def txt2img(asked: TextToImage, http: HTTPRequest) -> dict[str, Any]:
        return await answer(asked, http)

    @router.post("/img2img")
    async def img2img(asked: ImageToImage, http: HTTPRequest) -> dict[str, Any]:
        return await answer(asked, http, asked.editing(studio))


def _watch(router: APIRouter, studio: Studio, jobs: WeakSet[Job]) -> None:
    def current() -> Job | None:
        """The job that is drawn now, of those asked for by these routes."""
        return next((job for job in jobs if job.state == "drawing"), None)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        job = current()
        state = {"job": "", "job_count": 0, "sampling_step": 0, "sampling_steps": 0}
        if job is None:
            return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None}
        if not skip_current_image:
            job.preview_every = _PREVIEWED  # from here on: nobody else looks at them
        state |= {"job": "drawing", "job_count": 1, "sampling_step": job.steps_done}
        state |= {"sampling_steps": job.steps, "interrupted": False, "skipped": False}
        image = None if skip_current_image or job.preview is None else encoded(job.preview)
        since = time.time() - job.created
        eta = since * (1 - job.fraction) / job.fraction if job.fraction else 0.0
        return {
            "progress": job.fraction,
            "eta_relative": eta,
            "state": state,
            "current_image": image,
        }

    @router.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        if (job := current()) is not None:
            studio.queue.cancel(job)
        return {}


def _describe(router: APIRouter, studio: Studio) -> None:
    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": name, "aliases": [], "options": {}} for name in solvers.names()]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        return [{"name": name, "label": name} for name in timetables.names()]

    @router.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        return [{"name": UPSCALER, "model_name": None, "model_path": None, "scale": 4}]

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        name = studio.name
        return [{"title": name, "model_name": name, "hash": None, "filename": name, "config": None}]

    @router.get("/options")
    async def options() -> dict[str, Any]:
        return options_of(studio)

    @router.post("/options")
    async def set_options(wanted: Options) -> dict[str, Any]:
        check_options(studio, wanted.model_extra or {})
        return {}
