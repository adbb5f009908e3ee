# SPDX-License-Identifier: Apache-2.0
"""What a model is called in tables: short, but never one name for two of them.

Two runs are of one model where checkpoint, subfolder and everything that changes an answer are the same.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUR_ADAPTER = "blip3"
ONE_OF_MANY = re.compile(r"final|checkpoint-\d+")
"""Last parts of folders that every training has."""
BASE_RESOLUTION = "base resolution"
SAME_ANSWERS = (
    *("pretrained", "model_version", "subfolder"),
    *("device", "device_map", "batch_size", "max_batch_size", "trust_remote_code"),
    *("base_url", "api_key", "token", "num_concurrent", "timeout", "max_retries"),
)
"""Arguments of a run that are named elsewhere or change no answer."""
DEFAULTS = {
    "dtype": "auto",
    "chat": "auto",
    "end_of_shot": "auto",
    "seed": "0",
    "max_new_tokens": "1024",
}
"""Values that say nothing, since they hold where nothing was given."""


@dataclass(frozen=True)
class ModelName:
    """Two names of the model of a run."""

    short: str
    """For tables."""
    full: str
    """That no other model has."""


def name_model(arguments: Mapping[str, Any], adapter: str = OUR_ADAPTER) -> ModelName:
    """Name the model of a run.

    A folder that is there is resolved, so that `.` is the folder's own name. That presumes that results are read where
    they were written.

    Args:
        arguments: `pretrained` or `model_version`, `subfolder` and settings, as the run had them.
        adapter: that the harness asked it through.

    >>> name_model({"pretrained": "/data/sft/final", "do_image_splitting": "False"}).short
    'sft/final (base resolution)'
    >>> name_model({"pretrained": "/data/dpo/final", "dtype": "float32"}, "openai").full
    '/data/dpo/final (dtype=float32, through openai)'
    """
    named = str(arguments.get("pretrained") or arguments.get("model_version") or "model")
    if Path(named).exists():
        named = str(Path(named).resolve())
    parts = [part for part in named.split("/") if part] or [named]
    last = parts[-2:] if ONE_OF_MANY.fullmatch(parts[-1]) else parts[-1:]
    subfolder = [part for part in str(arguments.get("subfolder") or "").split("/") if part]
    about = _settings(arguments, adapter)
    behind = f" ({', '.join(about)})" if about else ""
    return ModelName("/".join(last + subfolder) + behind, "/".join([named.rstrip("/"), *subfolder]) + behind)


def _settings(arguments: Mapping[str, Any], adapter: str) -> list[str]:
    """Say what a run changed: the base resolution first."""
    words = {"true": "True", "false": "False"}  # as harnesses and our adapter read them, in any letters
    given = {key: str(value) for key, value in arguments.items() if key not in SAME_ANSWERS}
    given = {key: words.get(value.strip().lower(), value) for key, value in given.items()}
    is_base = given.get("do_image_splitting") in ("False", "0")
    if is_base:
        del given["do_image_splitting"]
    changed = [f"{key}={value}" for key, value in sorted(given.items()) if DEFAULTS.get(key) != value]
    through = [] if adapter == OUR_ADAPTER else [f"through {adapter}"]
    return [*([BASE_RESOLUTION] if is_base else []), *changed, *through]


def as_file_name(name: str) -> str:
    """Give a model's name as files may be called.

    >>> as_file_name("sft/final (base resolution)")
    'sft-final-base-resolution'
    """
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "model"


def parse_arguments(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """Read a run's arguments as lmms-eval keeps them.

    >>> parse_arguments("pretrained=.,subfolder=base")
    {'pretrained': '.', 'subfolder': 'base'}
    """
    if isinstance(text, Mapping):
        return dict(text)
    return {key: value for key, sign, value in (pair.partition("=") for pair in text.split(",")) if sign}
