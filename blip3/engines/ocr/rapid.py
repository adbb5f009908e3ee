# SPDX-License-Identifier: Apache-2.0
"""RapidOCR: PP-OCRv6 small on onnxruntime, with the models of its wheel (Apache-2.0); nothing is downloaded."""

import ctypes
import hashlib
import importlib.metadata
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...refusals import install
from .boxes import Quad, cut_quad, join_views, thickness
from .gaps import find_strings
from .readers import About, Line, Reading
from .views import OVERLAP, View, plan_views

MODELS = {
    "Det": "PP-OCRv6_det_small.onnx",
    "Rec": "PP-OCRv6_rec_small.onnx",
    "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
}
SHORT_SIDE = 736
MOST_ENLARGED = 1.75
"""The package enlarges until the shorter side has 736 pixels, however small the image: that takes twice the time, and
more neighbours are taken for one line. Enlarged less than 1.5 times, boxes become coarse (200 rendered strings)."""
_STRIDE = 32  # the detector's input is a multiple of it
_FRAME = 16  # around a view, in pixels of the detector's input: a box that the edge cut could not be tightened
_MAX_BOXES = 100_000  # of a view; the package's own limit of 1,000 would lose text without a word


def _model_folder() -> Path:
    """Find the models that the package brings.

    Raises:
        ImportError: if it is not installed, or brings none.
    """
    spec = find_spec("rapidocr")
    folder = Path(spec.origin).parent / "models" if spec and spec.origin else None
    missing = [name for name in MODELS.values() if folder is None or not (folder / name).is_file()]
    if folder is None or missing:
        given = f"{folder} lacks {', '.join(missing)}" if folder else "the package rapidocr is not installed"
        raise ImportError(
            f"The OCR reader 'rapidocr' needs the models in rapidocr's wheel, but {given}. The extra was probably "
            f"left out, or the package is older than 3.10: run {install('engines')}."
        )
    return folder


def about(turned_text: bool = False) -> About:
    """Say what the reader is made of, without loading it; raises as `Reader`."""
    folder = _model_folder()
    names = [name for part, name in MODELS.items() if turned_text or part != "Cls"]
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    version = importlib.metadata.version("rapidocr")
    licences = {"rapidocr": "Apache-2.0", "PP-OCRv6 small (PaddleOCR)": "Apache-2.0"}
    made_with = {"rapidocr": version, "onnxruntime": importlib.metadata.version("onnxruntime"), "licences": licences}
    return About({"rapidocr": version, "models": digests, "turned_text": turned_text}, made_with)


class Reader:
    """PP-OCRv6: a detector looks at views of the image, and a recogniser reads what it found at full size.

    Args:
        turned_text: turn text round that stands on its head, by a third model. It also turns some short strings that
            were right, such as 494, so it is for photographs of documents.

    Raises:
        ImportError: if the package or its models are not there.
    """

    dilation = 1.0

    def __init__(self, turned_text: bool = False):
        folder = _model_folder()
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(1)
        onnxruntime = "EngineConfig.onnxruntime"
        self._engine = RapidOCR(
            params={
                f"{onnxruntime}.intra_op_num_threads": 1,
                f"{onnxruntime}.inter_op_num_threads": 1,
                "Global.log_level": "critical",
                "Global.use_preprocess_img": False,  # views are cut and scaled here
                "Global.use_vertical_padding": False,
                "Det.limit_type": "max",
                "Det.limit_side_len": 2**16,
                "Det.max_candidates": _MAX_BOXES,
                "Rec.rec_batch_num": 1,  # padding to the longest line of a batch costs more than a batch saves
                "Det.use_dilation": False,  # it joins neighbours that stand close together
                **{f"{part}.model_path": str(folder / name) for part, name in MODELS.items()},
            }
        )
        self._turned_text = turned_text

    def read(self, image: Image.Image) -> Reading:
        """Find and read the text of an image; see `OcrReader`."""
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # (H, W, 3) BGR, as it learned
        views = plan_views(pixels.shape[:2], SHORT_SIDE, MOST_ENLARGED)
        found = [self._detect(pixels, view) for view in views]
        quads = join_views(found) if len(views) > 1 else found[0]
        lines = tuple(self._recognise(pixels, quads))
        _return_memory()
        return Reading(lines, min(1.0, views[-1].scale))

    def _detect(self, pixels: np.ndarray, view: View) -> list[Quad]:
        """Find lines in one view; corners in pixels of the image."""
        import cv2

        cut = pixels[view.top : view.bottom, view.left : view.right]
        height, width = cut.shape[:2]
        rows, columns = (max(1, round(side * view.scale)) for side in (height, width))
        method = cv2.INTER_AREA if view.scale < 1 else cv2.INTER_LINEAR
        scaled = cv2.resize(cut, (columns, rows), interpolation=method)
        down, across = (-(-(side + 2 * _FRAME) // _STRIDE) * _STRIDE - side - _FRAME for side in (rows, columns))
        framed = cv2.copyMakeBorder(scaled, _FRAME, down, _FRAME, across, cv2.BORDER_REPLICATE)
        found = self._engine(framed, use_cls=False, use_rec=False)
        if found.boxes is None:
            return []
        ratio, corner = np.array([width / columns, height / rows]), np.array([view.left, view.top])
        quads = [_quad((box - _FRAME) * ratio + corner) for box in np.asarray(found.boxes, dtype=np.float64)]
        return [quad for quad in quads if not view.is_whole or thickness(quad) > OVERLAP / 2]

    def _recognise(self, pixels: np.ndarray, quads: list[Quad]) -> list[Line]:
        if not quads:
            return []
        crops = self._crop(pixels, quads)
        pieces = [split_line(quad, crop, self.dilation) for quad, crop in zip(quads, crops, strict=True)]
        if any(len(piece) > 1 for piece in pieces):
            quads = [quad for piece in pieces for quad in piece]
            crops = self._crop(pixels, quads)
        if self._turned_text:
            crops, _ = self._engine.cls_and_rotate(crops)
        read = self._engine.recognize_txt(crops)
        return [
            Line(text.strip(), quad, float(score))
            for text, quad, score in zip(read.txts, quads, read.scores, strict=True)
            if text.strip()
        ]

    def _crop(self, pixels: np.ndarray, quads: list[Quad]) -> list[np.ndarray]:
        """Cut lines out, turned so that they run from left to right."""
        return self._engine.crop_text_regions(pixels, np.asarray(quads, dtype=np.float32))


def _return_memory() -> None:
    """Give freed memory back to the system, where the C library can: it keeps holes of every size an image asked for.

    Without it a worker that reads images of many sizes grows to twice what it needs.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def split_line(quad: Quad, crop: np.ndarray, dilation: float) -> list[Quad]:
    """Split a line where it holds several strings side by side.

    Args:
        quad: of the line.
        crop: (height, width, 3), cut out along it; a line that runs downwards is turned by 90 degrees.
        dilation: of the detector.
    """
    strings = find_strings(crop)
    if not strings:
        return [quad]
    height, width = crop.shape[:2]
    (x1, y1), (x2, y2), _, (x4, y4) = quad
    runs_down = np.hypot(x4 - x1, y4 - y1) >= 1.5 * np.hypot(x2 - x1, y2 - y1)  # as the package turns them
    parts = [(left / width, top / height, right / width, bottom / height) for left, top, right, bottom in strings]
    if runs_down:  # turned against the clock: the line's right side lies on top
        parts = [(1 - bottom, left, 1 - top, right) for left, top, right, bottom in parts]
    return [cut_quad(quad, part, dilation) for part in parts]


def _quad(corners: Any) -> Quad:
    first, second, third, fourth = ((float(x), float(y)) for x, y in corners)
    return first, second, third, fourth
