"""The page in Chromium, by a real keyboard and mouse."""

import io
import os
import shutil
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tiny import tiny_bundle

from latentdiff import LatentDiffusionPipeline
from latentdiff.cli.serve import listen
from latentdiff.server.app import create_app
from latentdiff.server.jobs import Job
from latentdiff.server.studio import Limits, Studio

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
expect.set_options(timeout=30_000)  # milliseconds, for machines that have much else to do
QUIET = ["disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
         "disable-component-update", "disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(LatentDiffusionPipeline(tiny_bundle()), Limits(side=64), at_once=2**12)


@pytest.fixture(scope="module")
def address(studio: Studio) -> Iterator[str]:
    listening = listen("127.0.0.1", 0)
    app = create_app(studio, ["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    arguments = [f"--{one}" for one in (*QUIET, *(["no-sandbox"] if os.getuid() == 0 else []))]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1200, "height": 850})
    page.goto(address)
    page.locator("#steps").fill("3")
    yield page
    page.close()


def drawn(studio: Studio) -> Job:
    """The job that ended last."""
    return [job for job in studio.queue.jobs.values() if job.state == "done"][-1]


def draw(page: Page, studio: Studio, prompt: str) -> Job:
    page.locator("#prompt").fill(prompt)
    expect(page.locator("#history img")).to_have_count(1)
    return drawn(studio)


def pixels(job: Job) -> np.ndarray:
    data = job.pictures[0]
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_picture_comes_as_one_types_and_typing_on_cancels(
    page: Page, address: str, studio: Studio
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    # Slower than a keyboard, on any machine.
    unet = studio.pipe.bundle.network.module
    slow = unet.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    page.locator("#steps").fill("150")
    page.locator("#prompt").fill("a cat")
    expect(page.locator("#progress")).to_be_visible()
    page.locator("#prompt").press_sequentially(" with a hat", delay=20)
    page.wait_for_timeout(1000)
    slow.remove()
    expect(page.locator("#history img")).to_have_count(1)
    assert drawn(studio).request.prompt == "a cat with a hat"
    assert [job.state for job in studio.queue.jobs.values()][-2:] == ["cancelled", "done"]
    assert "seed 0" in page.inner_text("#told")
    assert all(url.startswith((address, "blob:")) for url in asked)


def test_a_mask_drawn_with_the_mouse_changes_what_is_under_it_alone(
    page: Page, studio: Studio
) -> None:
    before = pixels(draw(page, studio, "a cat"))
    page.locator("[data-tool=brush]").click()
    box = page.locator("#board").bounding_box()
    assert box is not None
    across = [box["x"] + box["width"] * part for part in (0.4, 0.6)]
    down = box["y"] + box["height"] / 2
    page.mouse.move(across[0], down)
    page.mouse.down()
    page.mouse.move(across[1], down, steps=6)
    page.mouse.up()
    expect(page.locator("#history img")).to_have_count(2)
    changed = (pixels(drawn(studio)) != before).any(-1)
    rows, columns = np.nonzero(changed)
    assert len(rows)
    assert rows.min() >= 5
    assert rows.max() <= 10
    assert columns.min() >= 4
    assert columns.max() <= 11


def test_a_picture_that_is_dropped_brings_its_settings_back(page: Page, studio: Studio) -> None:
    page.locator("#steps").fill("4")
    kept = draw(page, studio, "a cat")
    page.locator("#typing").uncheck()
    page.locator("#steps").fill("9")
    page.locator("#prompt").fill("something else")
    file = {"name": "a.png", "mimeType": "image/png", "buffer": kept.pictures[0] or b""}
    page.locator("#file").set_input_files(file)  # pyright: ignore[reportArgumentType]
    expect(page.locator("#told")).to_contain_text("its settings are back")
    assert page.input_value("#prompt") == "a cat"
    assert page.input_value("#steps") == "4"
