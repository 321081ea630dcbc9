"""A folder of drawn shapes in four styles: single things on white, as compositions need them."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 128
STYLES = {
    "noto": (214, 50, 50), "twemoji": (60, 110, 220), "fluent-3d": (70, 160, 70),
    "fluent-flat": (250, 205, 60),
}  # fmt: skip
POLYGONS: dict[str, list[tuple[int, int]]] = {
    "kite": [(64, 8), (100, 50), (64, 120), (28, 50)],
    "house": [(64, 10), (118, 56), (104, 56), (104, 116), (24, 116), (24, 56), (10, 56)],
    "rocket": [(64, 4), (84, 40), (84, 90), (108, 120), (20, 120), (44, 90), (44, 40)],
    "boomerang": [(10, 20), (64, 70), (118, 20), (92, 20), (64, 44), (36, 20)],
    "ladder": [(44, 6), (84, 6), (84, 122), (44, 122)],
    "brick": [(8, 44), (120, 44), (120, 88), (8, 88)],
    "tent": [(64, 16), (122, 110), (6, 110)],
    "anchor": [(56, 10), (72, 10), (72, 80), (112, 70), (64, 122), (16, 70), (56, 80)],
}


def shape_folder(root: Path) -> Path:
    """Eight things in four styles, all but the last two of one style for training."""
    (root / "images").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for name, polygon in POLYGONS.items():
        for style, colour in STYLES.items():
            image = Image.new("RGB", (SIDE * 4, SIDE * 4), "white")
            points = [(4 * x, 4 * y) for x, y in polygon]
            ImageDraw.Draw(image).polygon(points, fill=colour, outline=(40, 40, 40), width=8)
            path = f"images/{style}_{name}.png"
            image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(root / path)
            unseen = name == "tent" and style == "noto"
            rows.append(
                {
                    "file_name": path, "text": f"{style} emoji of a {name}", "style": style,
                    "captions": [f"{style} emoji of a {name}", name], "name": name, "base": name,
                    "codepoints": name, "group": "Objects", "skin_tone": "", "gender": "",
                    "keywords": [], "split": "test_style" if unseen else "train",
                }
            )  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "metadata.jsonl").write_text(lines, "utf-8")
    return root
