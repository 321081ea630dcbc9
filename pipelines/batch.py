"""Pictures of many prompts, or latents of many pictures, by several processes or machines (Ray).

    python pipelines/batch.py draw prompts.jsonl --out drawn --workers 2
    python pipelines/batch.py encode PICTURES --model runs/mine/vae --size 64 --out latents

`draw` reads `prompt` and perhaps `negative_prompt` from each line of a .jsonl file or row of a
.parquet file. Row i becomes picture i of --seed, in drawn/00000/00000012.png, a thousand a folder;
at last drawn/metadata.parquet tells of each, so that the folder can be trained on.
`encode` writes the latents of a folder of captioned pictures by the autoencoder of a folder, the
`vae` of stage 2, which reads them with `data.latents=latents`.

Work is done in chunks of --chunk rows that are the same however many workers there are, each by one
thread of its own: so what comes out is the same to the byte, whoever was killed in between. A
second start does what is missing. With --workers 0, the default, all is done here; more need the
extra `ray`, and --address names a cluster, whose machines all see the files.
"""

import argparse
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from latentdiff import LatentDiffusionPipeline, Request, UserError
from latentdiff.bundle import Bundle
from latentdiff.data.examples import load_picture
from latentdiff.data.folder import list_folder
from latentdiff.data.parquet import fields_of_parquet
from latentdiff.files import make_folder, write_bytes, write_json
from latentdiff.formats.autoencoder_files import load_autoencoder
from latentdiff.learning.batches import latent_cache, to_range
from latentdiff.pictures import encode_png
from latentdiff.pipeline.prompts import check_negatives, check_prompts
from latentdiff.pipeline.record import about_request, png_text
from latentdiff.reading import parse_json, read_text

MOST = 2**30  # bytes of a file of prompts
READ = ("prompt", "negative_prompt")
Row = Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """What is to be done to every row, as the command line says it."""

    what: Literal["draw", "encode"]
    source: str
    out: str
    model: str | None
    device: str
    threads: int
    chunk: int
    seed: int
    steps: int
    guidance_scale: float | None
    solver: str | None
    size: int | None

    @property
    def same(self) -> dict[str, object]:
        """What a second start must have in common with the first."""
        changing = ("out", "source")
        return {name: value for name, value in asdict(self).items() if name not in changing}


class Worker(ABC):
    """A model, loaded once for each process, that does chunks; Ray's actor, or this process."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.job = job

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Do chunks; in Ray's words, a batch of rows with numbers of chunks and their rows."""
        for number, rows in zip(batch["number"], batch["rows"], strict=True):
            self.do(int(number), json.loads(rows))
        return {"number": [int(number) for number in batch["number"]]}

    @abstractmethod
    def do(self, number: int, rows: Sequence[Any]) -> None:
        """Do a chunk, and write what comes of it."""


class Drawer(Worker):
    """Draws the rows of a chunk in one batch, and writes each picture."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        bundle = Bundle.load(job.model, device=job.device, engine="auto")
        self.pipe = LatentDiffusionPipeline(bundle)

    def do(self, number: int, rows: Sequence[Row]) -> None:
        """See `Worker.do`."""
        job, first = self.job, number * self.job.chunk
        request = Request(
            prompt=[row["prompt"] for row in rows],
            negative_prompt=[row["negative_prompt"] for row in rows],
            seed=job.seed,
            first=first,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            solver=job.solver,
            height=job.size or self.pipe.bundle.size[0],
            width=job.size or self.pipe.bundle.size[1],
        )
        record = about_request(self.pipe.bundle, request)
        drawn = self.pipe.draw(request, progress=False).images
        for index, (row, image) in enumerate(zip(rows, drawn, strict=True), first):
            own = {"prompt": row["prompt"], "seed": job.seed, "index": index}
            own["negative_prompt"] = row["negative_prompt"]
            text = png_text({**record, **own})
            target = place(Path(job.out), index)
            make_folder(target.parent)
            write_bytes(target, encode_png(image, text), replace=True)  # by the same bytes


class Encoder(Worker):
    """Encodes the pictures of a chunk one by one, and writes their latents into one file."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.autoencoder = load_autoencoder(Path(job.model or ""))
        torch.nn.Module.to(self.autoencoder.module, job.device)  # diffusers' own has no types
        self.examples = list_folder(job.source)
        assert job.size is not None
        self.kept = latent_cache(self.autoencoder, job.size, Path(job.out)).tensors

    @torch.no_grad()
    def do(self, number: int, rows: Sequence[int]) -> None:
        """See `Worker.do`."""
        size = self.job.size
        assert size is not None
        made: dict[str, torch.Tensor] = {}
        for row in rows:
            example = self.examples[row]
            pixels = to_range(load_picture(example, size)[None].to(self.job.device))
            key = hashlib.sha256(example.read()).hexdigest()
            made[key] = self.autoencoder.moments(pixels)[0].cpu().contiguous()
        self.kept.put(made)
        done = done_file(Path(self.job.out), number)
        make_folder(done.parent)
        write_bytes(done, b"", replace=True)


def place(out: Path, index: int) -> Path:
    """The file of a picture."""
    return out / f"{index // 1000:05d}" / f"{index:08d}.png"


def done_file(out: Path, number: int) -> Path:
    """The mark of a chunk of latents that is written."""
    return out / "done" / f"{number:08d}"


def rows_of(file: Path) -> list[Row]:
    """The prompts of a .jsonl or .parquet file.

    Raises:
        UserError: it cannot be read, or a row says what is not read here.
    """
    if file.suffix == ".parquet":
        found: list[Any] = fields_of_parquet(file)
    else:
        try:
            lines = read_text(file, MOST).splitlines()
            found = [parse_json(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the prompts of {file}: {error}") from None
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{file}: row {number} has no prompt.")
        row["negative_prompt"] = row.get("negative_prompt") or ""  # a column of tables holds None
        try:
            check_prompts(row["prompt"])
            check_negatives(row["negative_prompt"], 1)
        except UserError as error:
            raise UserError(f"{file}: row {number}: {error}") from None
        if unknown := [name for name in row if name not in READ]:
            told = " and ".join(READ)
            raise UserError(f"{file}: row {number} has {unknown[0]!r}; read are {told}.")
    if not found:
        raise UserError(f"{file}: it holds no prompt.")
    return found


def chunks_of(rows: Sequence[Any], job: Job) -> Iterator[dict[str, object]]:
    """The chunks that are not done, as Ray's rows."""
    out = Path(job.out)
    for number, start in enumerate(range(0, len(rows), job.chunk)):
        part = list(rows[start : start + job.chunk])
        if job.what == "draw":
            done = all(place(out, index).exists() for index in range(start, start + len(part)))
        else:
            done = done_file(out, number).exists()
        if not done:
            yield {"number": number, "rows": json.dumps(part)}


def run(job: Job, rows: Sequence[Any], workers: int, address: str) -> None:
    """Do all chunks that are not done, here or by Ray's actors."""
    chunks = list(chunks_of(rows, job))
    print(f"{len(rows)} rows, {len(chunks)} chunks of {job.chunk} to do", flush=True)
    if not chunks:
        return
    kind = Drawer if job.what == "draw" else Encoder
    if workers == 0:
        worker = kind(job)
        for chunk in tqdm(chunks, leave=False):
            worker({name: [value] for name, value in chunk.items()})
        return
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--workers needs Ray: pip install 'latentdiff[ray]'") from None
    cpus = None if address != "local" else workers * job.threads
    ray.init(address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(size=workers)
    # A killed actor is started again, and its chunk done again.
    told = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        kind,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=pool,
        num_cpus=job.threads,
        num_gpus=0 if job.device == "cpu" else 1,
    )
    try:
        done = sum(len(batch["number"]) for batch in told.iter_batches(batch_size=None))
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, UserError) else error) from None
    finally:
        ray.shutdown()
    if done != len(chunks):
        raise UserError(f"{len(chunks) - done} of {len(chunks)} chunks are missing: start again.")


def write_metadata(job: Job, rows: Sequence[Row]) -> None:
    """Tell of each picture in one parquet file, as a folder to train on has it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = Path(job.out)
    files = [place(out, index) for index in range(len(rows))]
    table = pa.table({
        "file_name": [file.relative_to(out).as_posix() for file in files],
        "text": [row["prompt"] for row in rows],
        "negative_prompt": [row["negative_prompt"] for row in rows],
        "seed": pa.array([job.seed] * len(rows), pa.uint64()),
        "index": list(range(len(rows))),
        "sha256": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
    })  # fmt: skip
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_bytes(out / "metadata.parquet", buffer.getvalue().to_pybytes(), replace=True)


def keep_settings(job: Job, rows: Sequence[Any]) -> None:
    """Write down what is drawn, or check that a second start asks for the same.

    Raises:
        UserError: it does not, or the folder is another's.
    """
    file = Path(job.out) / "batch.json"
    told = json.dumps(list(rows)).encode()
    wanted = {**job.same, "rows": hashlib.sha256(told).hexdigest()}
    if file.is_file():
        if parse_json(read_text(file, 2**20)) != json.loads(json.dumps(wanted)):
            raise UserError(f"{job.out} was begun with other settings or rows: name another --out.")
        return
    if Path(job.out).is_dir() and any(Path(job.out).iterdir()):
        raise UserError(f"{job.out} holds something else: name another --out.")
    make_folder(Path(job.out))
    write_json(file, wanted, replace=False)


def check_encoding(job: Job) -> None:
    """Check the options of `encode`.

    Raises:
        UserError: one is missing, or is of `draw` alone.
    """
    if job.size is None or job.model is None:
        raise UserError("encode needs the --model and --size of stage 2 (vae and data.size).")
    plain = {"seed": 0, "steps": 20, "guidance_scale": None, "solver": None}
    if told := [name for name, value in plain.items() if getattr(job, name) != value]:
        raise UserError(f"--{told[0].replace('_', '-')} is of draw alone: leave it out.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw or encode very many pictures.")
    parser.add_argument("what", choices=["draw", "encode"])
    parser.add_argument("source", help="of draw a .jsonl or .parquet file; of encode a folder")
    parser.add_argument("--out", required=True, help="a folder")
    parser.add_argument("--model", help="default: the bundled one; of encode the vae of stage 2")
    parser.add_argument("--device", default="cpu", help="of each worker: cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of each worker; changes last bits")
    parser.add_argument("--chunk", type=int, default=8, help="rows drawn in one batch")
    parser.add_argument("--seed", type=int, default=0, help="row i is picture i of it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--solver")
    parser.add_argument("--size", type=int, help="pixels along a side; default: the model's own")
    parser.add_argument("--workers", type=int, default=0, help="Ray's actors; 0: this process")
    parser.add_argument("--address", default="local", help="of a Ray cluster")
    given = vars(parser.parse_args())
    workers, address = given.pop("workers"), given.pop("address")
    job = Job(**given)
    try:
        if min(job.threads, job.chunk) < 1 or workers < 0:
            raise UserError("--threads and --chunk are at least 1, --workers at least 0.")
        if job.size is not None and job.size < 1:
            raise UserError("--size is at least 1.")
        if address != "local" and workers == 0:
            raise UserError("--address is for --workers, which are 0: give both, or neither.")
        if job.what == "draw":
            rows: list[Any] = rows_of(Path(job.source))
            keep_settings(job, rows)
        else:
            check_encoding(job)
            names = [example.name for example in list_folder(job.source)]
            rows = list(range(len(names)))
            keep_settings(job, names)
        run(job, rows, workers, address)
        if job.what == "draw":
            write_metadata(job, rows)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(job.out)


if __name__ == "__main__":
    main()
