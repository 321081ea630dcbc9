"""Who may ask the server for what: the whole matrix of requests, and clients that mean harm."""

import asyncio
import io
import itertools
import json
import os
import socket
import threading
import time
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.types import Message
from tiny import tiny_bundle, unet_of

from latentdiff import LatentDiffusionPipeline
from latentdiff.cli.serve import listen
from latentdiff.server import app as app_module
from latentdiff.server.app import create_app
from latentdiff.server.connections import server_of
from latentdiff.server.guard import Guard
from latentdiff.server.studio import Limits, Studio

GOOD = "localhost:7860"
HOSTS = [(GOOD,), ("evil.example",), ("localhost.evil.example:7860",), (), (GOOD, "evil.example")]
ORIGINS = [(), (f"http://{GOOD}",), ("null",), ("http://evil.example",), ("http://localhost:1",)]
METHODS = ["POST", "GET", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
FORM = "multipart/form-data; boundary=x"
TYPES = ["application/json", "application/json; charset=utf-8", FORM, "text/plain", "",
         "application/x-www-form-urlencoded", "application/jsonp"]  # fmt: skip


def png(side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


IMAGE = b64encode(png()).decode()
BODIES = {  # that draw one step
    "/v1/images/generations": {"prompt": "a", "steps": 1},
    "/sdapi/v1/txt2img": {"prompt": "a", "steps": 1},
    "/sdapi/v1/img2img": {"prompt": "a", "steps": 1, "init_images": [IMAGE],
                          "denoising_strength": 1},
    "/jobs": {"prompt": "a", "num_inference_steps": 1},
    "/v1/images/edits": {},
}  # fmt: skip
FIELDS = b"".join(
    b'--x\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % field
    for field in ((b"prompt", b"a"), (b"steps", b"1"), (b"strength", b"1"))
)
FILE = (
    b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
)
FORM_BODY = FIELDS + FILE % png()


class Counting:
    """A studio of a tiny model, which counts the calls of its network."""

    def __init__(self, *, waiting: int = 256) -> None:
        bundle = tiny_bundle()
        self.calls = 0
        unet_of(bundle).register_forward_hook(self._count)
        self.pipe = LatentDiffusionPipeline(bundle)
        limits = Limits(side=64, body=2**20, waiting=waiting)
        self.studio = Studio(self.pipe, limits, at_once=16 * 16 * 16)

    def _count(self, *_: object) -> None:
        self.calls += 1


async def ask(
    app: FastAPI, method: str, path: str, headers: list[tuple[str, str]], body: bytes
) -> tuple[int, dict[str, str]]:
    """The status and headers of the answer to a request, as a server hands it to the app."""
    given = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return given.pop() if given else await asyncio.Event().wait()  # pyright: ignore

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": raw, "scheme": "http", "http_version": "1.1",
        "server": ("localhost", 7860), "client": ("127.0.0.1", 1), "root_path": "",
    }  # fmt: skip
    await app(scope, receive, send)
    start = sent[0]
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}


def test_of_all_requests_only_those_that_may_draw_do() -> None:
    """Host x Origin x method x content type, of every path that draws, with a body that would."""
    counted = Counting()
    app = create_app(counted.studio, ["localhost"])
    statuses: Counter[int] = Counter()
    allowed = 0

    async def all_of_them() -> None:
        nonlocal allowed
        matrix = itertools.product(HOSTS, ORIGINS, METHODS, TYPES, BODIES)
        for hosts, origins, method, kind, path in matrix:
            wanted = path == "/v1/images/edits"
            body = FORM_BODY if wanted else json.dumps(BODIES[path]).encode()
            headers = [("host", host) for host in hosts]
            headers += [("origin", origin) for origin in origins]
            headers += [("content-type", kind)] if kind else []
            headers += [("content-length", f"{len(body)}")]
            status, answered = await ask(app, method, path, headers, body)
            fits = kind == FORM if wanted else kind.partition(";")[0] == "application/json"
            may = hosts == (GOOD,) and origins in ORIGINS[:2] and method == "POST" and fits
            assert (status < 300) == may, (hosts, origins, method, kind, path, status)
            assert not [name for name in answered if name.startswith("access-control")]
            assert answered["x-content-type-options"] == "nosniff"
            allowed += may
            statuses[status] += 1
            assert len(counted.studio.queue.jobs) == min(allowed, 100)

    asyncio.run(all_of_them())
    counted.studio.queue.close()
    assert allowed == 4 * 2 * 2 + 2
    # each draws one step of one picture, by one call: prompts and their negatives together
    assert allowed - 4 <= counted.calls <= allowed  # the last of /jobs may have been cancelled
    assert set(statuses) == {200, 201, 403, 405, 415}


@contextmanager
def serving(studio: Studio, patience: float) -> Iterator[int]:
    """A server at a real socket, which waits so many seconds for headers and for a body; its
    port."""
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(app_module, "Guard", partial(Guard, patience=patience))
        app = create_app(studio, ["127.0.0.1"])
        listening = listen("127.0.0.1", 0)
        server = server_of(app, patience)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def counted() -> Counting:
    return Counting()


@pytest.fixture(scope="module")
def port(counted: Counting) -> Iterator[int]:
    with serving(counted.studio, patience=1.0) as port:
        yield port


def raw(port: int, data: bytes, seconds: float = 20) -> bytes:
    """What the server answers to some bytes, up to the end of the connection or of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(2**16):
            answer += chunk
            head, _, body = answer.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if b"content-length:" in line]
            if length and len(body) >= int(length[0].split(b":")[1]):
                break
        return answer


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def alive(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=20).status_code == 200


def head(port: int, method: str, path: str, *more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"host: 127.0.0.1:{port}", *more, "", ""]
    return "\r\n".join(lines).encode("latin-1")


OUT = ["../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
       "..\\..\\windows", "..%5c..%5cguard.py", "%2fetc%2fpasswd", "....//....//etc/passwd",
       "guard.py", "0.png%00", "%c0%ae%c0%ae/etc/passwd", "a" * 5000, "~root/.bashrc"]  # fmt: skip


@pytest.mark.parametrize("place", ["/", "/jobs/", "/jobs/x/pictures/", "/page.js/", "/sdapi/v1/"])
def test_no_path_reaches_a_file(place: str, port: int, counted: Counting) -> None:
    for path in OUT:
        answer = raw(port, head(port, "GET", place + path))
        assert status(answer) in (400, 404, 405, 422), path
        assert b"root:" not in answer
        assert b"import " not in answer
    assert counted.calls == 0


def test_what_is_too_large_is_refused_before_it_is_read(port: int, counted: Counting) -> None:
    json_kind = "content-type: application/json"
    for path in BODIES:
        for length in (f"{2**20 + 1}", f"{2**63}", "9" * 400):
            refused = raw(port, head(port, "POST", path, json_kind, f"content-length: {length}"))
            assert status(refused) in (400, 413), path  # some lengths are none to the parser
    chunk = b"10000\r\n" + b"a" * 2**16 + b"\r\n"
    chunked = head(port, "POST", "/jobs", json_kind, "transfer-encoding: chunked")
    assert status(raw(port, chunked + chunk * 20)) == 413
    deep = b"[" * 2**19
    body = head(port, "POST", "/jobs", json_kind, f"content-length: {len(deep)}") + deep
    assert status(raw(port, body)) == 400
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    image = b64encode(bomb.getvalue()).decode()
    told = httpx.post(f"http://127.0.0.1:{port}/jobs", json={"prompt": "a", "image": image})
    assert (told.status_code, told.json()["error"]["param"]) == (400, "image")
    assert counted.calls == 0
    assert alive(port)


def test_slow_and_silent_clients_keep_nobody_from_being_served(
    port: int, counted: Counting
) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for number, connection in enumerate(silent):
        connection.sendall(b"POST /jobs HT" if number % 2 else b"")
    slow = head(port, "POST", "/jobs", "content-type: application/json", "content-length: 100")
    began = time.monotonic()
    assert status(raw(port, slow + b"{")) == 408
    assert 0.9 < time.monotonic() - began < 15
    assert alive(port)
    for connection in silent:
        connection.settimeout(20)
        assert connection.recv(1) == b""  # the server has closed it
        connection.close()
    assert counted.calls == 0


@pytest.mark.parametrize("second", [False, True])
def test_headers_that_do_not_come_in_time_end_their_connection(
    second: bool, port: int, counted: Counting
) -> None:
    """They come line by line without end; of the first request, or after another's answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        if second:
            connection.sendall(head(port, "GET", "/model"))
            assert b"200 OK" in connection.recv(2**16)
        began = time.monotonic()
        connection.sendall(b"GET /model HTTP/1.1\r\n")
        connection.settimeout(0.1)
        while time.monotonic() - began < 15:
            with suppress(TimeoutError):
                try:
                    connection.sendall(b"x: y\r\n")
                    ended = connection.recv(2**16) == b""
                except ConnectionError:
                    ended = True
                if ended:
                    break
        assert 0.9 < time.monotonic() - began < 12
    assert alive(port)
    assert counted.calls == 0


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_200_at_once_are_drawn_as_one_by_one_or_told_to_wait() -> None:
    counted = Counting(waiting=64)

    async def all_at_once(port: int) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            asked = (
                client.post(
                    f"http://127.0.0.1:{port}/v1/images/generations",
                    json={"prompt": f"a {number % 5} disc", "steps": 2, "seed": number},
                )
                for number in range(200)
            )
            return list(await asyncio.gather(*asked))

    before = resident()
    with serving(counted.studio, patience=30) as port:
        answers = asyncio.run(all_at_once(port))
        assert alive(port)
    assert resident() - before < 2**28
    assert {answer.status_code for answer in answers} <= {200, 429}
    drawn = {n: a.json() for n, a in enumerate(answers) if a.status_code == 200}
    assert len(drawn) >= 64  # as many may wait
    assert counted.calls < len(drawn)  # of two for each, if each were drawn by itself
    for number, answer in list(drawn.items())[::3]:
        data = b64decode(answer["data"][0]["b64_json"])
        picture = np.asarray(Image.open(io.BytesIO(data))).astype(int)
        serial = counted.pipe(
            f"a {number % 5} disc", seed=number, num_inference_steps=2, progress=False
        ).images[0]
        assert abs(picture - np.asarray(serial)).max() <= 1  # another batch may round otherwise
