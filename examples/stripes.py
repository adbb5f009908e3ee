# SPDX-License-Identifier: Apache-2.0
r"""Render images of stripes with the number of stripes as the answer: a task the small model was not trained on.

    python examples/stripes.py outputs/stripes

writes 40 images to train on and 20 to test on, each folder with

    images/00.png ...   1 to 6 stripes each
    data.jsonl          {"image", "question", "answer"} a line: the form of your own data
    pairs.jsonl         the same with "rejected", a wrong answer
    metadata.jsonl      the same as data.jsonl with "file_name": what `datasets` reads as an image folder
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

QUESTION = "How many stripes are there?"
MAX_STRIPES = 6
COLOURS = ("#c0392b", "#1f618d", "#1e8449", "#6c3483", "#b9770e", "#212f3c")
PAPERS = ("#ffffff", "#fdf6e3", "#eaf2f8", "#eef5ea")


def render(num_stripes: int, seed: int) -> Image.Image:
    """Render an image of vertical stripes of one colour, of random widths and distances."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(130, 200, 2))
    image = Image.new("RGB", (width, height), PAPERS[rng.integers(len(PAPERS))])
    pen, colour = ImageDraw.Draw(image), COLOURS[rng.integers(len(COLOURS))]
    cell = width / num_stripes  # each stripe stays within its own cell
    for index in range(num_stripes):
        thickness = rng.uniform(0.3, 0.6) * min(cell, width / 3)
        left = index * cell + rng.uniform(0.1, 0.9) * (cell - thickness)
        pen.rectangle((left, 0.06 * height, left + thickness, 0.94 * height), fill=colour)
    return image


def write(folder: Path, count: int, first_seed: int) -> None:
    """Write `count` images with their questions and answers; the numbers of stripes take turns."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict]] = {"data": [], "pairs": [], "metadata": []}
    for index in range(count):
        num_stripes = 1 + index % MAX_STRIPES
        wrong = 1 + (num_stripes + index // MAX_STRIPES % (MAX_STRIPES - 1)) % MAX_STRIPES  # the others take turns too
        name = f"images/{index:02}.png"
        render(num_stripes, first_seed + index).save(folder / name)
        row = {"question": QUESTION, "answer": str(num_stripes)}
        files["data"].append({"image": name, **row})
        files["pairs"].append({"image": name, **row, "rejected": str(wrong)})
        files["metadata"].append({"file_name": name, **row})
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def main() -> None:
    """Read the command line and write both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("outputs/stripes"), help="default: %(default)s")
    parser.add_argument("--train", type=int, default=40, help="images to train on (default: %(default)s)")
    parser.add_argument("--test", type=int, default=20, help="images to test on (default: %(default)s)")
    args = parser.parse_args()
    write(args.output / "train", args.train, first_seed=1_000)
    write(args.output / "test", args.test, first_seed=9_000)
    print(f"{args.output}: {args.train} images to train on, {args.test} to test on")


if __name__ == "__main__":
    main()
