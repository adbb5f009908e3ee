# SPDX-License-Identifier: Apache-2.0
"""Tesseract: the program, one process for each image. It finds words on printed pages and few in photographs."""

import csv
import io
import os
import shutil
import subprocess
from collections.abc import Iterator

from PIL import Image

from .boxes import Quad
from .readers import About, Line, Reading

MAX_SIDE = 32_767
"""Of an image that the program takes, in pixels."""
_TIMEOUT_SECONDS = 600


def _find_program(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ValueError(
            f"The OCR reader 'tesseract' needs the program {program!r}, but no such program is on the PATH. It was "
            "probably not installed: `apt-get install tesseract-ocr`, or pass its path as --tesseract-program."
        )
    return found


def about(program: str = "tesseract", language: str = "eng", layout: int = 11) -> About:
    """Say what the reader is made of; raises as `Reader`."""
    answer = _run([_find_program(program), "--version"])
    version = answer.split("\n", 1)[0].strip()
    settings = {"tesseract": version, "language": language, "layout": layout}
    return About(settings, {"tesseract": version, "licences": {"tesseract and its language data": "Apache-2.0"}})


class Reader:
    """Tesseract.

    Args:
        program: its name, or path.
        language: of its data, such as `eng` or `eng+deu`.
        layout: its page segmentation mode; 11 looks for text anywhere.

    Raises:
        ValueError: if there is no such program.
    """

    dilation = 0.0  # its boxes are those of the ink

    def __init__(self, program: str = "tesseract", language: str = "eng", layout: int = 11):
        self._command = [_find_program(program), "stdin", "stdout", "-l", language, "--psm", str(layout), "tsv"]

    def read(self, image: Image.Image) -> Reading:
        """Find and read the text of an image; see `OcrReader`.

        Raises:
            ValueError: with what the program says, if it fails.
        """
        scale = min(1.0, MAX_SIDE / max(image.size))
        if scale < 1:
            image = image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))
        file = io.BytesIO()
        image.save(file, "PPM")
        return Reading(tuple(_lines(_run(self._command, file.getvalue()), scale)), scale)


def _run(command: list[str], given: bytes = b"") -> str:
    """Run the program on one thread and give what it writes.

    Raises:
        ValueError: with its last line of errors, if it fails.
    """
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    done = subprocess.run(command, input=given, capture_output=True, env=environment, timeout=_TIMEOUT_SECONDS)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["nothing"]
        raise ValueError(f"Tesseract ended with the code {done.returncode} and said {said[-1]!r}.")
    return done.stdout.decode("utf-8", "replace")


def _lines(table: str, scale: float) -> Iterator[Line]:
    """Put the words of the program's table together, line by line."""
    words: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE):
        if row["level"] == "5" and row["text"].strip():
            words.setdefault((row["block_num"], row["par_num"], row["line_num"]), []).append(row)
    for line in words.values():
        boxes = [[float(word[name]) / scale for name in ("left", "top", "width", "height")] for word in line]
        x1, y1 = min(box[0] for box in boxes), min(box[1] for box in boxes)
        x2, y2 = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
        quad: Quad = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
        confidence = sum(float(word["conf"]) for word in line) / len(line) / 100
        yield Line(" ".join(word["text"].strip() for word in line), quad, min(max(confidence, 0.0), 1.0))
