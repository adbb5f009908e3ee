# SPDX-License-Identifier: Apache-2.0
"""Functions several test files use; fixtures are in conftest.py."""

import sys
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from blip3.conversion import cli as convert_weights

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ROOT / "configs" / "4b"  # the architecture of the released checkpoints
SHARED = ROOT.parent / "shared"  # facts about the reference, beside the repository; not part of it
IS_TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5

TRL_ARGUMENTS = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "report_to": "none",
    "trust_remote_code": True,
}  # one step of any of TRL's trainers

needs_reference = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference fixtures are not beside the repository"
)


def convert(*arguments: object) -> None:
    """Run the converter's command line and expect success."""
    assert convert_weights.main([str(argument) for argument in arguments]) == 0


def load_model(folder: Path, **kwargs: object) -> torch.nn.Module:
    """Load a repository through the public door, in float32."""
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **kwargs)


def render_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """Draw smooth random colours: content that survives a resize."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class QuietServer(ThreadingHTTPServer):
    """A server that says nothing when a client hangs up.

    The traceback that the standard one prints in its thread calls `ast.parse`, which before Python 3.11.8 breaks an
    `ast.parse` of the main thread (python/cpython#106905): transformers reading a repository's code, for one.
    """

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
