# SPDX-License-Identifier: Apache-2.0
"""The process that `cold_start.py` starts: imports, loads, answers with one token, and prints how long each took.

It imports nothing of this package, because what a user imports is what is timed; but for the file beside it that lets
transformers import torchvision.
"""

import importlib
import itertools
import json
import sys
import time
from typing import Any

PROMPT = "<image> What is this?"
IMAGE_SIZE = (640, 480)  # (width, height)


def answer_cold(folder: str, started: float, threads: int) -> dict[str, float]:
    """Go from nothing to a first token as a user's script does; gives the seconds of each phase.

    Args:
        folder: of the checkpoint with its processor.
        started: `time.time()` just before this process was started, so that the interpreter counts as import.
        threads: of torch.
    """
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(threads)
    stamps = [started, time.time()]
    options: dict[str, Any] = {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(folder, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", **options)
    stamps.append(time.time())
    inputs = processor(text=[PROMPT], images=[Image.new("RGB", IMAGE_SIZE)], return_tensors="pt").to(model.dtype)
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    stamps.append(time.time())
    phases = [after - before for before, after in itertools.pairwise(stamps)]
    return dict(zip(("import", "load", "first"), phases, strict=True)) | {"all": stamps[-1] - started}


if __name__ == "__main__":
    importlib.import_module("optional_torchvision").load_torchvision()  # beside this file; counts as import
    sys.stdout.write(json.dumps(answer_cold(**json.loads(sys.argv[1]))) + "\n")
