"""Fine-tune on one style under many settings and seeds, and put what each gives into a table.

    python training/measure/compare_style.py --pictures data/streamline40 --style streamline \\
        --data data/emoji128 --data data/streamline

Each run is `latentdiff finetune` with the words of its line in SETTINGS and nothing else, then
`evaluate_style.py`. What is finished is not done again, so it may be stopped at any time. OUT gets
table.md: means over the seeds, the processor time of a run, and how far the held-out losses of two
seeds lie apart, as a share of what they drop by.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.errors import UserError
from latentdiff.files import make_folder, write_json, write_text
from latentdiff.learning.command import told_in_one_line

STYLE = "captions.style={style} style"
SETTINGS: dict[str, list[str]] = {
    "defaults": [],
    "all pictures learned, last weights": ["held_out.fraction=0"],
    "prodigy": ["optimizer=prodigy"],
    "schedule-free": ["optimizer=schedule-free"],
    "rank 4": ["--rank", "4"],
    "rank 64": ["--rank", "64"],
    "attention alone": ["lora.targets=attention"],
    "later layers": ["lora.blocks=[up_blocks]"],
    "low times": ["objective.times_max=0.6"],
    "high times": ["objective.times_min=0.4"],
    "style words alone, 30 %": [STYLE, "captions.content_dropout=0.3"],
    "style words left out, 20 %": [STYLE, "captions.style_dropout=0.2"],
    "prior captions in the old style": ["prior.style=noto style", "prior.target=picture"],
    "pseudo-Huber": ["objective.huber=0.1"],
    "text encoder": ["lora.text_encoder=true", "text_lr=2e-4"],
    "new word and LoRA": ["--token", "{style}", "text_lr=5e-3"],
}
COLUMNS = ("seen", "new", "untouched")


def main(
    pictures: Annotated[Path, typer.Option(metavar="DIR", help="A folder of `pick_style.py`.")],
    style: Annotated[str, typer.Option(help="Its style, a value of the field `style`.")],
    data: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Real pictures; see evaluate_style.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="For the runs and table.md.")] = Path(
        "runs/compare-style"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting.")] = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="A name in SETTINGS; may be given again. Default: all.")
    ] = None,
) -> None:
    """Compare settings of a fine-tune by what they make of one style."""
    with told_in_one_line():
        names = only or list(SETTINGS)
        if unknown := set(names) - SETTINGS.keys():
            raise UserError(f"--only {unknown.pop()}: one of {', '.join(SETTINGS)}")
        make_folder(out)
        rows: list[str] = []
        for name in names:
            runs = [
                run(out / f"{slug(name)}-{seed}", name, seed, pictures, style, data or [])
                for seed in range(seeds)
            ]
            rows.append(row(name, runs))
            write_text(out / "table.md", table(rows), replace=True)
        typer.echo(table(rows))


def words_of(name: str, style: str) -> list[str]:
    """The words of a setting, for pictures of this style."""
    return [word.format(style=style) for word in SETTINGS[name]]


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def run(
    folder: Path, name: str, seed: int, pictures: Path, style: str, data: Sequence[Path]
) -> dict[str, object]:
    """One fine-tune and its measure, or what is left of them, with its processor seconds."""
    done = folder / "measured" / "run.json"
    if not done.exists():
        words = ["finetune", "--data", str(pictures), "--out", str(folder), "--seed", str(seed)]
        begun = os.times()
        call("-m", "latentdiff", *words, *words_of(name, style))
        ended = os.times()
        spent = (ended.children_user - begun.children_user, ended.children_system)
        seconds = round(sum(spent) - begun.children_system)
        lora = ["--lora", str(folder / "pytorch_lora_weights.safetensors")]
        words = folder / "learned_embeds.safetensors"
        lora += ["--embedding", str(words)] if words.exists() else []
        roots = [word for root in data for word in ("--data", str(root))]
        where = ["--style", style, "--pictures", str(pictures), *lora, *roots]
        measure = Path(__file__).with_name("evaluate_style.py")
        call(str(measure), *where, "--out", str(done.parent))
        write_json(done, {"seconds": seconds, "curve": curve(folder / "log.jsonl")}, replace=True)
    report = json.loads((done.parent / "style.json").read_text("utf-8"))
    return {**report, **json.loads(done.read_text("utf-8"))}


def call(*words: str) -> None:
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        raise UserError(f"ended with {code}: {' '.join(words)}")


def curve(log: Path) -> list[tuple[int, float]]:
    """Step and held-out loss of each measurement of a run."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [(line["step"], line["held_out"]) for line in lines if "held_out" in line]


def gap(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float | None:
    """The largest distance of two curves, as a share of the drop of the first; None without one."""
    first, second = ({int(step): loss for step, loss in each} for each in (one, other))
    both = sorted(first.keys() & second.keys())
    drop = first[both[0]] - min(first.values()) if both else 0.0
    return max(abs(first[step] - second[step]) for step in both) / drop if drop > 0 else None


def row(name: str, runs: Sequence[dict[str, object]]) -> str:
    """A line of the table: means over the runs."""

    def mean(group: str, key: str) -> float:
        values = [one[f"{group}, after"][key] for one in runs]  # pyright: ignore[reportIndexIssue]
        return sum(values) / len(values)

    asked = [one["new, after"]["of_asked"]["both"] for one in runs]  # pyright: ignore[reportIndexIssue]
    milder = sum(asked) / len(runs)
    kept = [one["kept"] for one in runs if one.get("kept") is not None]
    curves = [one["curve"] for one in runs]
    apart = gap(*curves[:2]) if len(curves) > 1 else None  # pyright: ignore[reportArgumentType]
    cells = [
        f"{100 * mean('seen', 'style'):.1f}",
        f"{100 * mean('new', 'style'):.1f}",
        f"{100 * mean('new', 'both'):.1f}",
        f"{100 * milder:.1f}",
        f"{100 * sum(kept) / len(kept):.0f}" if kept else "",  # pyright: ignore[reportArgumentType, reportCallIssue]
        "" if apart is None else f"{apart:.2f}",
        f"{sum(one['seconds'] for one in runs) / len(runs) / 60:.1f}",  # pyright: ignore[reportArgumentType, reportCallIssue]
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def table(rows: Sequence[str]) -> str:
    """The table in Markdown."""
    head = "| setting | style of the seen, % | style of new things, % | style and content of new "
    head += "things, % | ... among the asked, % | untouched kept, % | held-out curves apart | "
    head += "processor minutes |"
    return "\n".join([head, "|---" * 8 + "|", *rows]) + "\n"


if __name__ == "__main__":
    typer.run(main)
