# SPDX-License-Identifier: Apache-2.0
"""The process that `memory.py` starts: does one task and prints the peak of its memory as JSON."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from . import candidates
from .machine import DTYPES
from .training_step import freeze_tower

POLL_SECONDS = 0.001
PAGE_BYTES = 4096  # no smaller peak can be seen


class Peak:
    """Watches memory from `start` to `stop`, above what was taken at the start."""

    def __init__(self, device: str):
        self.device = device
        self.highest = (0, 0)
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Note the present state and watch from now on."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = (torch.cuda.memory_allocated(self.device),) * 2
            return
        self.before = self.highest = resident_bytes()
        self.thread.start()

    def stop(self) -> dict[str, int]:
        """Give the peak in bytes: the process's own, and with mapped files."""
        if self.device != "cpu":
            highest = (torch.cuda.max_memory_allocated(self.device),) * 2
        else:
            self.done.set()
            self.thread.join()
            self._note()
            highest = self.highest
        own, everything = (max(top - start, PAGE_BYTES) for top, start in zip(highest, self.before, strict=True))
        return {"own_bytes": own, "all_bytes": everything}

    def _watch(self) -> None:
        while not self.done.wait(POLL_SECONDS):
            self._note()

    def _note(self) -> None:
        own, everything = resident_bytes()
        self.highest = (max(own, self.highest[0]), max(everything, self.highest[1]))


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process: its own, and with the mapped pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return 1024 * kib["RssAnon:"], 1024 * (kib["RssAnon:"] + kib["RssFile:"])


def run_task(request: dict[str, Any]) -> dict[str, int]:
    """Do what was asked for and give the peak."""
    device, dtype = request["device"], request["dtype"]
    torch.set_num_threads(request["threads"])
    _warm_up(request["kind"], dtype, device)
    if request["task"] == "load":
        return _watch(device, lambda: _load(request["folder"], dtype, device))
    sizes = candidates.SIZES[request["sizes"]]
    model = candidates.build(request["kind"], sizes, dtype, device)
    inputs = candidates.make_inputs(request["kind"], sizes, request["rows"], device, dtype)
    if request["task"] == "prefill":
        return _watch(device, lambda: candidates.prefill(model, inputs))
    freeze_tower(model)
    if request["checkpointing"]:
        model.gradient_checkpointing_enable()
    labelled = candidates.label(inputs, sizes)
    return _watch(device, lambda: model(**labelled).loss.backward())


def _warm_up(kind: str, dtype: str, device: str) -> None:
    """Load classes, kernels and caches before the watch begins, by a model of no size."""
    small = candidates.build(kind, candidates.QUICK, dtype, device)
    candidates.prefill(small, candidates.make_inputs(kind, candidates.QUICK, [1], device, dtype))


def _watch(device: str, work: Callable[[], Any]) -> dict[str, int]:
    peak = Peak(device)
    peak.start()
    kept = work()
    found = peak.stop()
    del kept
    return found


def _load(folder: str, dtype: str, device: str) -> Any:
    """Load a checkpoint and read every weight once: mapped files take no memory before."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=DTYPES[dtype]).to(device)
    for weight in model.parameters():
        weight.detach().amax()
    return model


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_task(json.loads(sys.argv[1]))) + "\n")
