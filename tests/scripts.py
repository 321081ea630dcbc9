"""The training scripts as modules, and a folder of pictures small enough to train on in seconds."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    """`training/NAME.py`, imported by its path as `accelerate launch` would run it."""
    path = ROOT / f"training/{name}.py"
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture_folder(root: Path, count: int = 12, side: int = 32) -> Path:
    """Discs of different places and colours, with captions that say which."""
    root.mkdir()
    rows: list[dict[str, object]] = []
    ys, xs = np.mgrid[:side, :side]
    for number in range(count):
        colour = [(255, 0, 0), (0, 160, 0), (0, 0, 255)][number % 3]
        centre = 8 + (number * 5) % (side - 16), 8 + (number * 3) % (side - 16)
        pixels = np.full((side, side, 3), 255, dtype=np.uint8)
        pixels[(xs - centre[0]) ** 2 + (ys - centre[1]) ** 2 < 49] = colour
        Image.fromarray(pixels).save(root / f"{number}.png")
        name = ["red", "green", "blue"][number % 3]
        rows.append({"file_name": f"{number}.png", "text": f"a {name} disc", "base": str(number)})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "metadata.jsonl").write_text(lines)
    return root
