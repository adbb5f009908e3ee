# SPDX-License-Identifier: Apache-2.0
"""Folders for vLLM to serve, and transformers' answers. Without run.py nothing is collected here."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from blip3.conversion import random_checkpoint
from support import convert
from support.serving import silence_bytes

IS_ENABLED = os.environ.get("BLIP3_VLLM_TESTS") == "1"
collect_ignore_glob = [] if IS_ENABLED else ["test_*.py"]

HEAD_DIM = 96  # Phi-3-mini's; vLLM has no CPU kernel for the 12 of the other tests' tiny model
SHORT_WINDOW = 24


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the release's layout with the release's head width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_checkpoint, "TEXT_WIDTH", random_checkpoint.TEXT_HEADS * HEAD_DIM)
        return random_checkpoint.write_release_layout(tmp_path_factory.mktemp("source") / "xgen-mm-tiny")


@pytest.fixture(scope="session")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted folders by name: both text layouts, and settings that change what an image or a window is."""
    root = tmp_path_factory.mktemp("folders")
    for layout in ("fused", "unfused"):
        vision_config = source / "siglip_vision_config.json"
        convert(source, root / layout, "--vision-config", vision_config, "--text-layout", layout)
        silence_bytes(root / layout)
    changes: dict[str, Callable[[Path], None]] = {
        "short window": lambda folder: change(folder, "config.json", ["text_config"], sliding_window=SHORT_WINDOW),
        "fixed sampling": use_fixed_sampling,
        "no tiles": use_no_tiles,
    }
    for name, apply in changes.items():
        apply(shutil.copytree(root / "fused", root / name.replace(" ", "-")))
    return {name: root / name.replace(" ", "-") for name in ("fused", "unfused", *changes)}


def change(folder: Path, file: str, keys: list[str], **values: Any) -> None:
    """Set values in a JSON file, in the object that `keys` lead to."""
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    target = content
    for key in keys:
        target = target[key]
    target |= values
    (folder / file).write_text(json.dumps(content), encoding="utf-8")


def use_fixed_sampling(folder: Path) -> None:
    change(folder, "config.json", ["resampler_config"], token_sampling="fixed")
    change(folder, "processor_config.json", [], token_sampling="fixed")


def use_no_tiles(folder: Path) -> None:
    change(folder, "config.json", [], tile_grids=[])
    change(folder, "preprocessor_config.json", [], tile_grids=[])


@pytest.fixture(scope="session")
def elsewhere() -> Iterator[Callable]:
    """Call a function in a process that has never seen vLLM."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
