"""The server: the official OpenAI client, an A1111 client's calls, our own, and who is refused."""

import asyncio
import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline
from latentdiff.pipeline import Request
from latentdiff.server.a1111 import TextToImage
from latentdiff.server.app import PAGE, create_app
from latentdiff.server.guard import Guard, is_loopback
from latentdiff.server.jobs import Job
from latentdiff.server.studio import Limits, Studio

AT = "http://localhost"
PROMPT = {"prompt": "a red heart", "steps": 3, "seed": 7}


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline(tiny_bundle())


@pytest.fixture
def studio(pipe: LatentDiffusionPipeline) -> Studio:
    return Studio(pipe, Limits(side=64, body=2**20, waiting=40), at_once=4 * 16 * 16)


@pytest.fixture
def client(studio: Studio) -> Iterator[TestClient]:
    with TestClient(create_app(studio, ["localhost"]), base_url=AT) as client:
        yield client


def opened(data: str | bytes) -> np.ndarray:
    raw = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def serial(pipe: LatentDiffusionPipeline, prompt: str, seed: int, steps: int = 3) -> np.ndarray:
    output = pipe(prompt, seed=seed, num_inference_steps=steps, progress=False)
    return np.asarray(output.images[0]).astype(int)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Another batch size may round otherwise, by one grey level."""
    return one.shape == other.shape and np.abs(one - other).max() <= 1


def picture_with_a_hole(side: int = 16) -> Image.Image:
    picture = Image.new("RGBA", (side, side), (200, 40, 40, 255))
    picture.paste((0, 0, 0, 0), (4, 4, 12, 12))
    return picture


def test_openais_own_client_draws_edits_and_lists(
    client: TestClient, pipe: LatentDiffusionPipeline, studio: Studio
) -> None:
    api = openai.OpenAI(api_key="none", base_url=f"{AT}/v1", http_client=client, max_retries=0)
    assert [model.id for model in api.models.list()] == [studio.name]
    more = {"steps": 3, "seed": 7}
    drawn = api.images.generate(prompt="a red heart", n=2, size="16x16", extra_body=more)
    assert drawn.data is not None
    pictures = [opened(one.b64_json or "") for one in drawn.data]
    assert same(pictures[0], serial(pipe, "a red heart", 7))
    assert same(pictures[1], serial(pipe, "a red heart", 8))
    (linked,) = api.images.generate(
        prompt="a red heart", response_format="url", extra_body=more
    ).data or [None]
    assert linked is not None
    assert same(opened(client.get(linked.url or "").content), pictures[0])
    whole = png(picture_with_a_hole().convert("RGB"))
    edited = api.images.edit(
        image=("a.png", whole, "image/png"),
        mask=("mask.png", png(picture_with_a_hole()), "image/png"),
        prompt="a red heart",
        extra_body={"steps": 2, "seed": 3},
    )
    assert edited.data is not None
    result = opened(edited.data[0].b64_json or "")
    kept = np.ones((16, 16), bool)
    kept[4:12, 4:12] = False
    assert (result[kept] == opened(whole)[kept]).all()
    assert (result[~kept] != opened(whole)[~kept]).any()
    large = Image.effect_noise((90, 60), 99).convert("RGB")
    mask = Image.new("RGBA", large.size, "white")
    mask.paste((0, 0, 0, 0), (50, 20, 70, 40))
    files = {"image": ("a.png", png(large), "image/png"), "mask": ("m.png", png(mask), "image/png")}
    (pasted,) = api.images.edit(**files, prompt="a disc", size="90x60", extra_body=more).data or []  # pyright: ignore
    changed = (opened(pasted.b64_json or "") != np.asarray(large)).any(-1)
    assert changed[20:40, 50:70].mean() > 0.9
    assert changed.sum() == changed[20:40, 50:70].sum()
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3' here"):
        api.images.generate(prompt="a", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="height must be from 2 to 64") as refused:
        api.images.generate(prompt="a", size="1024x1024")
    assert refused.value.param == "height"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "size": "65x64"}, "width"),
        ({"prompt": "a", "size": "large"}, "size"),
        ({"prompt": "a", "steps": 151}, "steps"),
        ({"prompt": "a", "seed": -2}, "seed"),
        ({"prompt": "a", "style": "vivid"}, "style"),
        ({"prompt": "a", "background": "transparent"}, "background"),
        ({"prompt": "a", "solver": "magic"}, None),
        ({"prompt": "half \ud83d"}, None),
    ],
)
def test_a_mistake_is_told_as_openai_tells_it(
    client: TestClient, studio: Studio, body: dict[str, object], param: str | None
) -> None:
    answer = client.post("/v1/images/generations", content=json.dumps(body), headers=JSON)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert param is None or error["param"] == param
    assert studio.queue.batches == 0


JSON = {"content-type": "application/json"}


def test_an_a1111_client_draws_edits_watches_and_interrupts(
    client: TestClient, pipe: LatentDiffusionPipeline, studio: Studio
) -> None:
    body = {
        "prompt": "a red heart", "negative_prompt": "", "seed": 7, "steps": 3, "cfg_scale": 4,
        "width": 16, "height": 16, "batch_size": 2, "n_iter": 1, "sampler_name": "DPM++ 2M Karras",
        "enable_hr": False, "hr_scale": 2, "styles": [], "tiling": False, "alwayson_scripts": {},
    }  # fmt: skip
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    expected = pipe(
        "a red heart", seed=7, num_inference_steps=3, solver="dpmpp-2m", timetable="karras",
        progress=False,
    ).images[0]  # fmt: skip
    assert same(opened(answer["images"][0]), np.asarray(expected).astype(int))
    assert json.loads(answer["info"])["all_seeds"] == [7, 8]
    picture, mask = picture_with_a_hole().convert("RGB"), Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    edit = {
        "init_images": ["data:image/png;base64," + base64.b64encode(png(picture)).decode()],
        "mask": base64.b64encode(png(mask)).decode(),
        "mask_blur": 0, "denoising_strength": 1, "prompt": "a disc", "steps": 2, "seed": 1,
    }  # fmt: skip
    result = opened(client.post("/sdapi/v1/img2img", json=edit).json()["images"][0])
    assert (result[:4] == np.asarray(picture)[:4]).all()
    assert (result[4:12, 4:12] != np.asarray(picture)[4:12, 4:12]).any()
    refused = client.post("/sdapi/v1/txt2img", json=body | {"tiling": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "tiling")
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == studio.name
    assert {"name": "dpmpp-2m", "aliases": [], "options": {}} in client.get(
        "/sdapi/v1/samplers"
    ).json()
    assert client.get("/sdapi/v1/progress").json()["progress"] == 0
    with ThreadPoolExecutor() as pool:
        long = pool.submit(client.post, "/sdapi/v1/txt2img", json=body | {"steps": 150})
        while not client.get("/sdapi/v1/progress").json()["state"]["sampling_step"]:
            time.sleep(0.01)
        client.post("/sdapi/v1/interrupt")
        assert long.result().status_code == 409


def test_an_a1111_clients_second_pass_and_variations_are_the_pipelines(
    client: TestClient, pipe: LatentDiffusionPipeline
) -> None:
    """`hr_second_pass_steps` of 0 are the first pass's; subseeds count up beside one seed."""
    body = {
        "prompt": "a cat", "seed": 7, "steps": 4, "cfg_scale": 4, "denoising_strength": 0.5,
        "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Bicubic", "hr_prompt": "",
        "hr_resize_x": 0, "hr_sampler_name": None,
    }  # fmt: skip
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4, "progress": False}
    for second, wanted in ((0, 4), (6, 6)):
        answer = client.post("/sdapi/v1/txt2img", json=body | {"hr_second_pass_steps": second})
        image = opened(answer.json()["images"][0])
        expected = pipe("a cat", seed=7, edits=[f"hires:1.5:0.5:{wanted}"], **call).images[0]
        assert image.shape == (24, 24, 3)
        assert same(image, np.asarray(expected).astype(int))
    off = body | {"enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 9}
    plain = opened(client.post("/sdapi/v1/txt2img", json=off).json()["images"][0])
    assert same(plain, np.asarray(pipe("a cat", seed=7, **call).images[0]).astype(int))

    asked = off | {"subseed": 3, "subseed_strength": 0.4, "batch_size": 2}
    answer = client.post("/sdapi/v1/txt2img", json=asked).json()
    variation: dict[str, Any] = {"variation_seed": 3, "variation_strength": 0.4}
    varied = pipe(["a cat"] * 2, seed=7, **variation, **call).images
    drawn = [opened(image) for image in answer["images"]]
    for one, other in zip(drawn, varied, strict=True):
        assert same(one, np.asarray(other).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() > 8
    info = json.loads(answer["info"])
    assert (info["all_seeds"], info["all_subseeds"]) == ([7, 7], [3, 4])
    file = Image.open(io.BytesIO(base64.b64decode(answer["images"][1])))
    kept = json.loads(file.info["latentdiff"])
    assert [kept[name] for name in ("seed", "index", "variation_seed")] == [7, 0, 4]
    upscalers = client.get("/sdapi/v1/upscalers").json()
    assert [one["name"] for one in upscalers] == ["Bicubic"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"hr_upscaler": "Latent"}, "hr_upscaler"),
        ({"hr_resize_x": 40}, "hr_resize_x"),
        ({"hr_prompt": "a dog"}, "hr_prompt"),
        ({"hr_scale": 5}, "size"),
        ({"hr_scale": 1}, "enable_hr"),
        ({"denoising_strength": 0}, "enable_hr"),
        ({"hr_second_pass_steps": 151}, "hr_second_pass_steps"),
        ({"enable_hr": False, "subseed_strength": 0.5, "subseed": -7}, "subseed"),
    ],
)
def test_what_a_second_pass_cannot_be_is_refused_by_name(
    asked: dict[str, Any], param: str, client: TestClient, studio: Studio
) -> None:
    body = {"prompt": "a cat", "steps": 2, "seed": 1, "enable_hr": True}
    refused = client.post("/sdapi/v1/txt2img", json=body | asked)
    assert refused.status_code in (400, 422)
    assert refused.json()["error"]["param"] == param
    for steps in ("200", "9" * 5000):
        edit = {"prompt": "a", "edits": [f"hires:2:0.9:{steps}"], "num_inference_steps": 2}
        assert client.post("/jobs", json=edit).status_code == 400
    assert not studio.queue.jobs


def events(client: TestClient, job: str) -> list[dict]:
    with client.stream("GET", f"/jobs/{job}/events") as answer:
        lines = [line for line in answer.iter_lines() if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_job_tells_its_steps_shows_previews_and_keeps_its_pictures(
    client: TestClient, pipe: LatentDiffusionPipeline
) -> None:
    seed = 2**64 - 1
    body = {"prompt": "a red heart", "num_inference_steps": 3, "seed": seed, "preview_every": 1}
    begun = client.post("/jobs", json=body)
    assert begun.status_code == 201
    told = events(client, begun.json()["id"])
    assert [one["progress"] for one in told] == sorted(one["progress"] for one in told)
    last = told[-1]
    assert (last["state"], last["progress"], last["seeds"]) == ("done", 1, [f"{seed}"])
    picture = client.get(last["pictures"][0]).content
    assert same(opened(picture), serial(pipe, "a red heart", seed))
    kept = json.loads(Image.open(io.BytesIO(picture)).info["latentdiff"])
    assert (kept["prompt"], kept["seed"], kept["num_inference_steps"]) == ("a red heart", seed, 3)
    assert client.get("/jobs/none").status_code == 404
    assert client.get(last["pictures"][0].replace("/0.", "/1.")).status_code == 404


def test_a_job_that_another_replaces_or_a_client_leaves_is_cancelled(
    client: TestClient, studio: Studio
) -> None:
    long = {"prompt": "a red heart", "num_inference_steps": 150}
    first = client.post("/jobs", json=long).json()["id"]
    second = client.post("/jobs", json=long | {"replaces": first}).json()["id"]
    assert client.get(f"/jobs/{first}").json()["state"] == "cancelled"
    assert client.delete(f"/jobs/{second}").json()["state"] == "cancelled"
    assert events(client, second)[-1]["state"] == "cancelled"
    quick = client.post("/jobs", json=long | {"num_inference_steps": 1}).json()["id"]
    assert events(client, quick)[-1]["state"] == "done"
    assert not [job for job in studio.queue.jobs.values() if not job.over]


LONG_AGO = "a very long tale of " + ", ".join(f"heart {number}" for number in range(40))
GUIDES = ["autoguidance:2:{}", "clip:2:{}", "classifier:2:{}:heart"]


@pytest.mark.parametrize("guide", GUIDES)
def test_no_client_names_a_file_of_the_server(
    client: TestClient, studio: Studio, tmp_path: Path, guide: str
) -> None:
    model = tiny_bundle().save(tmp_path / "tiny")
    body = {"prompt": "a", "edits": ["pag:2", guide.format(model)]}
    refused = client.post("/jobs", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "edits")
    assert "reads files of the server" in refused.json()["detail"]
    many = client.post("/jobs", json=body | {"edits": ["tiled:0.9"]})
    assert (many.status_code, many.json()["error"]["param"]) == (400, "edits")
    assert not studio.queue.jobs
    begun = client.post("/jobs", json=body | {"edits": ["pag:2"], "num_inference_steps": 1})
    assert events(client, begun.json()["id"])[-1]["state"] == "done"
    assert f"{tmp_path}" not in client.get("/model").text


def test_what_is_wrong_with_a_job_is_told_to_it_alone_and_once(
    client: TestClient, studio: Studio
) -> None:
    body = {"prompt": "a red heart", "num_inference_steps": 2, "prompt_weights": True}
    holding = client.post("/jobs", json=body | {"num_inference_steps": 150}).json()["id"]
    cut, sound, empty, last = (
        client.post("/jobs", json=body | more).json()["id"]
        for more in ({"prompt": LONG_AGO, "num_images": 2}, {}, {"prompt": "( :1.2)"}, {})
    )
    client.delete(f"/jobs/{holding}")
    ends = {job: events(client, job)[-1] for job in (cut, sound, empty, last)}
    assert studio.queue.batches == 3  # what fits is drawn together
    assert [ends[job]["state"] for job in ends] == ["done", "done", "failed", "done"]
    assert len([line for line in ends[cut]["told"] if "a very long tale" in line]) == 1
    assert "holds weights but no words" in ends[empty]["error"]
    for other in (sound, empty, last):
        assert "tale" not in json.dumps(ends[other])
    assert "( :1.2)" not in json.dumps([ends[cut], ends[sound], ends[last]])
    alone = client.post("/jobs", json=body | {"prompt": LONG_AGO, "num_images": 6}).json()["id"]
    told = events(client, alone)
    assert all(one != other for one, other in itertools.pairwise(told))
    assert told[-1]["told"] == ends[cut]["told"]


def test_a_batch_and_what_waits_are_bounded_by_the_pixels_really_drawn(
    client: TestClient, studio: Studio
) -> None:
    picture = base64.b64encode(png(Image.effect_noise((90, 60), 99).convert("RGB"))).decode()
    edit = {
        "init_images": [picture], "prompt": "a", "steps": 2, "batch_size": 3, "width": 32,
        "height": 32, "denoising_strength": 1,
    }  # fmt: skip
    assert client.post("/sdapi/v1/img2img", json=edit).status_code == 200
    assert studio.queue.batches == 3  # 4 of the model's own 16 x 16 pixels make one
    (job,) = studio.queue.jobs.values()
    kept = json.loads(Image.open(io.BytesIO(job.pictures[0] or b"")).info["latentdiff"])
    assert (kept["edit"], kept["strength"], kept["seed"]) == ("SDEdit", 1, job.seeds[0])
    assert (job.pixels, job.held, job.request.edits, job.region) == (32 * 32, 0, [], None)
    assert client.post("/sdapi/v1/img2img", json=edit | {"height": None}).status_code == 422
    huge = client.post("/sdapi/v1/img2img", json=edit | {"width": 65, "height": 65})
    assert huge.json()["error"]["param"] == "width"
    studio.queue.most_held = 90 * 60 + 16 * 16
    hole = Image.new("L", (90, 60))
    hole.paste(255, (50, 20, 70, 40))
    mask = base64.b64encode(png(hole)).decode()
    body = {"prompt": "a", "image": picture, "mask": mask, "only_masked": True, "num_images": 2}
    held = client.post("/jobs", json=body | {"num_inference_steps": 150}).json()["id"]
    assert client.post("/jobs", json=body).status_code == 429
    client.delete(f"/jobs/{held}")
    assert client.post("/jobs", json=body | {"num_inference_steps": 1}).status_code == 201


def test_prompts_beside_one_another_are_bounded_and_count(
    client: TestClient, studio: Studio
) -> None:
    body = {"prompt_syntax": "a1111", "num_inference_steps": 1, "seed": 1}
    for prompt, told in [
        (" AND ".join("abcdefghij"), "10 prompts beside one another"),
        ("a <lora:none:1:2:3>", "is not to be had"),
        ("a AND ", "a part without words"),
    ]:
        refused = client.post("/jobs", json=body | {"prompt": prompt})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
        assert told in refused.json()["detail"]
    many = {"prompt": "a AND b", "also": ["c", "d:0.5"], "num_images": 2}
    begun = client.post("/jobs", json=body | many).json()["id"]
    assert events(client, begun)[-1]["state"] == "done"
    assert studio.queue.jobs[begun].pixels == 4 * 16 * 16
    assert studio.queue.batches == 2


def test_an_a1111_clients_prompts_are_read_by_its_syntax(
    client: TestClient, pipe: LatentDiffusionPipeline, studio: Studio
) -> None:
    body = {"seed": 7, "steps": 3, "cfg_scale": 4, "width": 16, "height": 16}
    prompt = "a [red|cat] AND hat:2"
    answer = client.post("/sdapi/v1/txt2img", json=body | {"prompt": prompt}).json()
    expected = pipe(
        prompt, prompt_syntax="a1111", seed=7, num_inference_steps=3, guidance_scale=4,
        progress=False,
    ).images[0]  # fmt: skip
    assert same(opened(answer["images"][0]), np.asarray(expected).astype(int))
    plain = pipe(prompt, seed=7, num_inference_steps=3, guidance_scale=4, progress=False).images[0]
    assert not same(opened(answer["images"][0]), np.asarray(plain).astype(int))
    for wrong, told in [
        ({"prompt": "a <lora:pixel:0.8>"}, "<lora:pixel:0.8>: it is not in the model"),
        ({"prompt": "a", "negative_prompt": "<lora:pixel:1>"}, "belongs into the prompt"),
        ({"prompt": " AND ".join("abcdefghij")}, "10 prompts beside one another"),
    ]:
        refused = client.post("/sdapi/v1/txt2img", json=body | wrong)
        assert refused.status_code == 400
        assert told in refused.json()["detail"]
    t5 = Studio(LatentDiffusionPipeline(tiny_bundle(tower="t5")), studio.limits, at_once=1)
    assert TextToImage(prompt="a").request(t5).prompt_syntax == "plain"
    t5.queue.close()


def test_no_batch_joins_long_prompts_of_different_jobs() -> None:
    """The chunks of the longest would be those of all."""
    readings: list[dict[str, Any]] = [{"long_prompts": True}, {"prompt_syntax": "a1111"}, {}]
    for reading in readings:
        one, other = (Job(Request(prompt=text, **reading), [0], 256) for text in ("a", "b"))
        assert one.fits(one)
        assert one.fits(other) == (not reading)


def test_an_a1111_client_watches_and_interrupts_its_own_jobs_alone(
    client: TestClient, studio: Studio
) -> None:
    long = {"prompt": "a red heart", "num_inference_steps": 150}
    other = client.post("/jobs", json=long).json()["id"]
    while client.get(f"/jobs/{other}").json()["state"] == "waiting":
        time.sleep(0.01)
    progress = client.get("/sdapi/v1/progress").json()
    assert (progress["progress"], progress["current_image"]) == (0, None)
    client.post("/sdapi/v1/interrupt")
    assert client.get(f"/jobs/{other}").json()["state"] == "drawing"
    client.delete(f"/jobs/{other}")
    assert client.post("/sdapi/v1/txt2img", json={"prompt": "a", "steps": 12}).status_code == 200
    assert [job.preview for job in studio.queue.jobs.values()] == [None, None]  # nobody looked
    with ThreadPoolExecutor() as pool:
        seen = pool.submit(client.post, "/sdapi/v1/txt2img", json={"prompt": "a", "steps": 150})
        while not (image := client.get("/sdapi/v1/progress").json()["current_image"]):
            time.sleep(0.01)
        client.post("/sdapi/v1/interrupt")
        assert seen.result().status_code == 409
    assert opened(image).shape == (16, 16, 3)


def test_bodies_that_wait_together_are_bounded() -> None:
    async def ask(guard: Guard, done: asyncio.Event, answers: list[int]) -> None:
        whole = {"type": "http.request", "body": b"a" * 2**10, "more_body": False}
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/jobs", "headers": [(b"host", b"localhost")]}
        try:
            await guard(scope, lambda: asyncio.sleep(0, whole), send)
        except HTTPException as refused:
            answers.append(refused.status_code)
            if len(answers) == 4:
                done.set()

    async def all_at_once() -> list[int]:
        done, answers = asyncio.Event(), list[int]()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await done.wait()

        guard = Guard(app, ["localhost"], None, (), most_bytes=2**10)
        await asyncio.gather(*(ask(guard, done, answers) for _ in range(12)))
        assert guard.held == 0
        return answers

    assert asyncio.run(asyncio.wait_for(all_at_once(), 10)) == [429] * 4


def test_many_at_once_are_all_answered_or_told_to_wait_and_share_batches(
    client: TestClient, pipe: LatentDiffusionPipeline, studio: Studio
) -> None:
    start = threading.Barrier(20)

    def ask(number: int) -> tuple[int, object]:
        if number < 20:
            start.wait()
        body = {"prompt": f"a {number % 3} disc", "steps": 3, "seed": number, "size": "16x16"}
        answer = client.post("/v1/images/generations", json=body)
        return answer.status_code, answer.json()

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(ask, range(60)))
    codes = [code for code, _ in answers]
    assert set(codes) <= {200, 429}
    drawn = codes.count(200)
    assert drawn >= 40
    assert studio.queue.batches < drawn / 2  # four fit into one
    for number in [number for number, code in enumerate(codes) if code == 200][::9]:
        body = answers[number][1]
        assert isinstance(body, dict)
        picture = opened(body["data"][0]["b64_json"])
        assert same(picture, serial(pipe, f"a {number % 3} disc", number))


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/images/generations", {"host": "evil.example"}, 403),
        ("/v1/images/generations", {"host": "localhost.evil.example"}, 403),
        ("/v1/images/generations", {"origin": "http://evil.example"}, 403),
        ("/v1/images/generations", {"origin": "null"}, 403),
        ("/jobs", {"origin": "http://localhost:1"}, 403),
        ("/jobs", {"content-type": "text/plain"}, 415),
        ("/jobs", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("/jobs", {"content-type": ""}, 415),
        ("/v1/images/generations", {"content-type": "multipart/form-data; boundary=x"}, 415),
        ("/v1/images/edits", {}, 415),
        ("/sdapi/v1/txt2img", {"content-length": f"{2**20 + 1}"}, 413),
        ("/sdapi/v1/txt2img", {"content-length": "-1"}, 413),
        ("/sdapi/v1/txt2img", {"content-length": "9" * 5000}, 413),
        ("/jobs", {"host": "[localhost"}, 403),
        ("/jobs", {"origin": "http://[localhost"}, 403),
    ],
)
def test_forbidden_requests_draw_nothing(
    client: TestClient, studio: Studio, path: str, headers: dict[str, str], status: int
) -> None:
    answer = client.post(path, content=json.dumps(PROMPT), headers=JSON | headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert studio.queue.batches == 0
    assert not studio.queue.jobs


def test_a_body_without_a_length_is_bounded_too(client: TestClient, studio: Studio) -> None:
    def endless() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"a" * 2**16

    answer = client.post("/jobs", content=endless(), headers=JSON)
    assert answer.status_code == 413
    assert client.post("/jobs", content=b"[" * 200_000, headers=JSON).status_code == 400
    assert client.post("/jobs", content=b'{"prompt": NaN}', headers=JSON).status_code == 400
    assert studio.queue.batches == 0


@pytest.mark.parametrize("path", ["/%2e%2e/guard.py", "/page.js%2f..%2fguard.py", "/guard.py"])
def test_no_path_leads_out(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_token_opens_everything_but_the_page(studio: Studio) -> None:
    with TestClient(create_app(studio, ["localhost"], "let me in"), base_url=AT) as client:
        for path in PAGE:
            assert client.get(path).status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401
        bearer = {"authorization": "Bearer let me in"}
        assert client.get("/v1/models", headers=bearer).status_code == 200
        assert client.get("/v1/models", auth=("anyone", "let me in")).status_code == 200


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    for path in PAGE:
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "0.0.0.0")] == [True, True, False]
