"""How long the page of `latentdiff serve` lets one wait: from the last key to the picture of it.

    python pipelines/measure/page.py --pictures 40

Needs the extra serve, `pip install playwright` and Chromium (`apt install chromium`). Types prompts
by a keyboard into the page, headless, against a server in a process of its own, and prints a row
for docs/benchmarks.md.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from latentdiff import UserError

PROMPTS = ("a red heart", "a green apple", "a cat face", "a blue whale", "a slice of pizza")
# Notes when the last key went down, and when a picture of the whole prompt is in the history.
WATCH = """() => {
  const box = document.getElementById("prompt"), told = { key: 0, waited: null };
  window.told = told;
  box.addEventListener("input", () =>
    Object.assign(told, { key: performance.now(), waited: null }));
  new MutationObserver(() => {
    const newest = document.querySelector("#history button");
    if (newest && told.waited === null && newest.title.startsWith(`${box.value.trim()}, seed`))
      told.waited = performance.now() - told.key;
  }).observe(document.getElementById("history"), { childList: true });
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long the page lets one wait.")
    parser.add_argument("--model", help="a folder; default: the bundled model")
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--steps", type=int, help="default: the page's own")
    parser.add_argument("--key", type=int, default=120, help="milliseconds from key to key")
    parser.add_argument("--dtype", help="of the server; default: its own")
    parser.add_argument("--browser", help="default: chromium or google-chrome")
    given = parser.parse_args()
    try:
        waits = measured(given)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    half, most = np.percentile(waits, [50, 95])
    print("| pictures | steps | a key every | p50 | p95 | CPUs |")
    print("|---|---|---|---|---|---|")
    row = [len(waits), given.steps or "the page's", f"{given.key} ms"]
    row += [f"{half:.2f} s", f"{most:.2f} s", os.cpu_count()]
    print("|", " | ".join(map(str, row)), "|")


def measured(given: argparse.Namespace) -> list[float]:
    """Seconds from the last key of each prompt to its picture; the first prompt warms up.

    Raises:
        UserError: there is no browser, or the server does not start.
    """
    browser = given.browser or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not shutil.which(browser):
        raise UserError("--browser: no Chromium here: apt install chromium, or name another.")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install playwright") from None
    sandbox = ["--no-sandbox"] if os.getuid() == 0 else []
    waits: list[float] = []
    with serving(given.model, given.dtype) as address, sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=browser, args=sandbox).new_page()
        page.goto(address)
        if given.steps is not None:
            page.locator("#steps").fill(str(given.steps))
        page.evaluate(WATCH)
        for number in range(given.pictures + 1):
            prompt: Any = page.locator("#prompt")
            prompt.fill("")
            page.locator("#seed").fill(str(number))  # what is there already would not be drawn
            prompt.press_sequentially(PROMPTS[number % len(PROMPTS)], delay=given.key)
            page.wait_for_function("() => window.told.waited !== null", timeout=120_000)
            waits.append(float(page.evaluate("() => window.told.waited")) / 1000)
    return waits[1:]


@contextmanager
def serving(model: str | None, dtype: str | None) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "latentdiff", "serve", "--port", "0"]
    command += ["--model", model] if model else []
    command += ["--dtype", dtype] if dtype else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise UserError("the server did not start.")
        time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
