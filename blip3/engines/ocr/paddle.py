# SPDX-License-Identifier: Apache-2.0
"""PaddleOCR 3, the engine that the report names, with models from folders that you name; nothing is downloaded."""

import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .readers import About, Line, Reading

MAX_SIDE = 4000
"""The pipeline shrinks images to this longest side before it looks for text."""
_CONFIG = "inference.yml"
_PARTS = {"detection": "text_detection", "recognition": "text_recognition", "orientation": "textline_orientation"}


def _models(folders: Mapping[str, str]) -> dict[str, str]:
    """Give the pipeline's arguments for its models; a folder says in its configuration which model it holds.

    Raises:
        ValueError: for a folder that holds no model.
    """
    arguments: dict[str, str] = {}
    for part, folder in folders.items():
        config = Path(folder, _CONFIG)
        named = re.search(r"^\s*model_name:\s*(\S+)", config.read_text("utf-8"), re.M) if config.is_file() else None
        if not folder or named is None:
            raise ValueError(
                f"--paddle-{part} is {folder!r}, which has no {_CONFIG} with a model_name, but the OCR reader "
                f"'paddleocr' needs a folder with PaddleOCR's {part} model. It was probably not downloaded, or is a "
                "folder too high: unpack the model and name the folder that holds its files."
            )
        arguments |= {f"{_PARTS[part]}_model_dir": str(folder), f"{_PARTS[part]}_model_name": named[1]}
    return arguments


def _folders(detection: str, recognition: str, orientation: str) -> dict[str, str]:
    folders = {"detection": detection, "recognition": recognition}
    return {**folders, "orientation": orientation} if orientation else folders


def about(detection: str = "", recognition: str = "", orientation: str = "") -> About:
    """Say what the reader is made of, without loading it; raises as `Reader`."""
    folders = _folders(detection, recognition, orientation)
    names = {part: value for part, value in _models(folders).items() if part.endswith("_name")}
    digests = {part: _digest(Path(folder)) for part, folder in folders.items()}
    try:
        version = importlib.metadata.version("paddleocr")
    except importlib.metadata.PackageNotFoundError:
        raise _not_installed() from None
    licences = {"paddleocr": "Apache-2.0", **{name: "see the model's card" for name in names.values()}}
    return About({"paddleocr": version, "models": digests}, {"paddleocr": version, "licences": licences})


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _not_installed() -> ImportError:
    return ImportError(
        "The OCR reader 'paddleocr' needs the packages paddleocr and paddlepaddle, which are not installed. No extra "
        "of this project brings them: run `pip install 'paddleocr>=3' 'paddlepaddle>=3'`."
    )


class Reader:
    """PaddleOCR 3.

    Args:
        detection: folder of the detection model.
        recognition: folder of the recognition model.
        orientation: folder of the model that turns text round which stands on its head; empty leaves it out.

    Raises:
        ValueError: for a folder that holds no model.
        ImportError: if the package is not installed.
    """

    dilation = 1.0  # measured with RapidOCR, whose detector grows boxes alike; not with this package's own models

    def __init__(self, detection: str = "", recognition: str = "", orientation: str = ""):
        models = _models(_folders(detection, recognition, orientation))
        try:
            from paddleocr import PaddleOCR
        except ImportError as error:
            raise _not_installed() from error
        self._pipeline = PaddleOCR(
            **models,
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=bool(orientation),
            device="cpu",
            cpu_threads=1,
            enable_mkldnn=False,  # with oneDNN paddlepaddle 3.3.0 and 3.3.1 fail at every image (Paddle's issue 77340)
        )

    def read(self, image: Image.Image) -> Reading:
        """Find and read the text of an image; see `OcrReader`."""
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # (H, W, 3) BGR, as it learned
        (result,) = self._pipeline.predict(pixels)
        return Reading(tuple(_lines(result)), min(1.0, MAX_SIDE / max(image.size)))


def _lines(result: Mapping[str, Any]) -> list[Line]:
    found = zip(result["rec_texts"], result["rec_polys"], result["rec_scores"], strict=True)
    lines = []
    for text, polygon, score in found:
        first, second, third, fourth = ((float(x), float(y)) for x, y in polygon)
        if text.strip():
            lines.append(Line(text.strip(), (first, second, third, fourth), float(score)))
    return lines
