"""Shards fetched as they are needed: the order, what lies on the disk, and going on exactly."""

import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import SCRIPTS, Lab

from latentdiff.data.folder import read_folder
from latentdiff.data.packing import write_shards
from latentdiff.data.stream import ShardStream, find_shards
from latentdiff.errors import UserError
from latentdiff.learning.checkpoint import checkpoints
from latentdiff.learning.order import WindowOrder

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 3), window=st.integers(1, 5), epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample_once_and_few_shards_at_a_time(
    counts: list[int], seed: int, window: int, epoch: int
) -> None:
    total = sum(counts)
    order = WindowOrder(counts, seed, window)
    first = epoch * total
    whole = [order.batch(step, 1)[0] for step in range(first, first + total)]
    assert sorted(whole) == list(range(total))
    again = WindowOrder(counts, seed, window)  # from the middle, without what comes before
    assert again.batch(first + total - 1, 1) == whole[-1:]
    shard_of = np.repeat(np.arange(len(counts)), counts)
    visits = [int(shard_of[sample]) for sample in whole]
    for shard in range(len(counts)):  # between its first and its last sample, few others
        places = [place for place, other in enumerate(visits) if other == shard]
        assert len(set(visits[places[0] : places[-1] + 1])) <= window


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Shards of two pictures, six of them, and stage 1 trained for one step."""
    lab = Lab(tmp_path_factory.mktemp("stream"))
    write_shards(lab.folder / "pictures", lab.folder / "shards", 2)
    where = [f"out={lab.folder}/ae", f"data.root={lab.folder}/pictures", "optim.steps=1"]
    module = SCRIPTS["autoencoder"]
    path = lab.folder / "autoencoder.yaml"
    module.train(module.load_config(module.AutoencoderConfig, path, where), False)
    (lab.folder / "vae").symlink_to(lab.folder / "ae/vae")
    return lab


@pytest.fixture(scope="module")
def address(lab: Lab) -> Iterator[str]:
    """A web server of the shards, on this machine alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(lab.folder / "shards"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/{{00000..00005}}.tar"
        server.shutdown()


def test_fetched_shards_are_those_on_the_disk_and_do_not_pile_up(
    lab: Lab, address: str, tmp_path: Path
) -> None:
    stream = ShardStream(find_shards(str(Path(address))), tmp_path / "at-hand", 2)
    folder = read_folder(lab.folder / "pictures")
    for number in (0, 1, 7, 3, 11, 0):
        example = stream[number]
        assert (example.read(), example.captions) == (
            folder[number].read(),
            folder[number].captions,
        )
        assert 1 <= len(list((tmp_path / "at-hand").iterdir())) <= 2


def train(lab: Lab, out: str, root: str, *overrides: str) -> None:
    module = SCRIPTS["diffusion"]
    where = [f"out={lab.folder / out}", f"data.root='{root}'", "shards_at_hand=1", "optim.steps=4"]
    path = lab.folder / "diffusion.yaml"
    config = module.load_config(module.DiffusionConfig, path, [*where, *overrides])
    module.train(config, False)


def test_a_run_on_fetched_shards_goes_on_where_it_was(lab: Lab, address: str) -> None:
    local = str(lab.folder / "shards/{00000..00005}.tar")
    train(lab, "local", local)
    assert "\n12 pictures of" in (lab.folder / "local/model/README.md").read_text()
    train(lab, "fetched", address, "optim.schedule=constant", "optim.steps=2")
    train(lab, "whole", address, "optim.schedule=constant")
    train(lab, "fetched", address, "optim.schedule=constant")
    assert len(list((lab.folder / "fetched/shards/process-0").iterdir())) <= 2
    whole, parts = (
        checkpoints(lab.folder / run / "checkpoints")[0] / "manifest.json"
        for run in ("whole", "fetched")
    )
    assert whole.read_text() == parts.read_text()
    losses = [
        json.loads((lab.folder / run / "log.jsonl").read_text().splitlines()[0])["loss"]
        for run in ("local", "fetched")
    ]
    assert losses[0] == losses[1]


def test_what_cannot_be_fetched_is_one_line(lab: Lab, address: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json does not have 00006"):
        find_shards(address.replace("00005", "00006"))
    with pytest.raises(UserError, match="where, held_out and balance"):
        train(lab, "refused", address, "data.balance=[base]")
    shards = find_shards(address)
    index = lab.folder / "shards/index.json"
    whole = index.read_text()
    try:
        index.write_text(whole.replace(str(shards[1].sha256), "0" * 64))
        stream = ShardStream(find_shards(address), tmp_path / "a", 2)
        with pytest.raises(UserError, match=r"00001\.tar does not match"):
            stream.of_shard(1)
        with index.open("w") as file:
            file.truncate(65 * 2**20)
        with pytest.raises(UserError, match="more than 67,108,864 bytes"):
            find_shards(address)
        index.write_text("[]")
        with pytest.raises(UserError, match="no index"):
            find_shards(address)
    finally:
        index.write_text(whole)
