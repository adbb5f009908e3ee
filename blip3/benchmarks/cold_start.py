# SPDX-License-Identifier: Apache-2.0
"""From the start of a process to the first token, of a small saved model: what a command or a new worker waits for.

    import          the interpreter, torch, and the classes of transformers that load a model
    load            processor and model by `Auto*`, from a folder; ours from the repository's root, its code with it
    first token     one image processed, and one token of `generate`

LLaVA-NeXT's classes get our tower, language model, tokenizer and grids, random weights, and are saved to a scratch
folder. Each run is a process of its own, and the order turns round. Files are in the system's memory after the first
round, which is not counted, and so is the code that transformers copies from a folder.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, LlavaNextForConditionalGeneration, LlavaNextProcessor

from ..hub import ROOT
from .bench import Bench
from .candidates import LLAVA, OURS, llava_config
from .clock import Comparison
from .images import find_llava_classes, llava_settings

PHASES = {"import": ", import", "load": ", load", "first": ", first token", "all": ", all"}
NAME = "cold start"


def measure_cold_start(bench: Bench) -> list[Comparison]:
    """Measure the small model and LLaVA-NeXT at like size."""
    with tempfile.TemporaryDirectory(prefix="blip3-benchmark-") as folder:
        parameters = {OURS: count_parameters(ROOT), LLAVA: save_llava(Path(folder))}
        folders = {OURS: ROOT, LLAVA: Path(folder)}
        runners = {name: partial(start_and_answer, path, bench.threads) for name, path in folders.items()}
        units = {phase: (suffix, "s", 1.0) for phase, suffix in PHASES.items()}
        least = 0 if bench.is_quick else 5
        return bench.compare(NAME, runners, units, {"parameters": parameters}, least=least)


def start_and_answer(folder: Path, threads: int) -> dict[str, float]:
    """Start a process that answers with one token; gives the seconds of each phase.

    Raises:
        RuntimeError: with the last words of the process.
    """
    child = str(Path(__file__).with_name("cold_start_child.py"))  # as a file: without what this package imports
    request = json.dumps({"folder": str(folder), "started": time.time(), "threads": threads})
    run = subprocess.run([sys.executable, child, request], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(
            f"A cold start from {folder} ended with status {run.returncode} before the first token. The checkpoint is "
            f"probably incomplete: load it by hand to see. The process's last words:\n{run.stderr[-1500:]}"
        )
    return json.loads(run.stdout.splitlines()[-1])


def count_parameters(folder: Path) -> int:
    """Count the weights of a saved model by the heads of its files."""
    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def save_llava(folder: Path) -> int:
    """Save LLaVA-NeXT with the small model's sizes, and its processor; gives the number of parameters."""
    own: Any = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    side, parts = own.vision_config.image_size, (own.vision_config.to_dict(), own.text_config.to_dict())
    config = llava_config(*parts, own.tile_grids, side, own.image_token_id)
    model = LlavaNextForConditionalGeneration(config).to(torch.bfloat16)  # as the small model is saved
    model.save_pretrained(folder)
    image_processor = find_llava_classes()[0](**llava_settings(own.tile_grids, side))
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    settings = {"patch_size": own.vision_config.patch_size, "num_additional_image_tokens": 0}
    processor = LlavaNextProcessor(image_processor, tokenizer, vision_feature_select_strategy="full", **settings)
    processor.save_pretrained(folder)
    return model.num_parameters()
