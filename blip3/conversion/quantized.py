# SPDX-License-Identifier: Apache-2.0
"""Folders that a quantized model saved: their weights are copied as they are, since they are no tensors of the model.

One thing is mended. On a CPU with AVX512-BF16, bitsandbytes 0.50.2 stores the scales of nf4 and fp4 weights column by
column at the first forward. `save_pretrained` then puts the weights back in order, and not those scales: the folder
loads without a message and answers nonsense. Scales in files have one dimension; scales with two are such scales.
"""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..files import sha256_of, write_json, write_text
from ..refusals import list_names
from .configs import Checkpoint, read_json

REQUIREMENTS = {
    "bitsandbytes": ("accelerate>=1.10", "bitsandbytes>=0.46.1"),
    "torchao": ("accelerate>=1.10", "torchao>=0.15"),
}
SCALES = ".absmax"


def weights_files(source: Path) -> list[Path]:
    """Return the safetensors files of a folder.

    Raises:
        FileNotFoundError: if there are none.
    """
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{source} has a quantization_config and no .safetensors file; expected the weights beside it. They were "
            "probably saved in another format: save the model with save_pretrained again."
        )
    return files


def copy_weights(source: Path, output: Path, is_verified: bool) -> None:
    """Copy the weights and their index; scales in the order of a CPU's packing are put back in the order of files.

    Raises:
        FileNotFoundError: see `weights_files`.
        ValueError: if a copy differs from its source.
    """
    for path in weights_files(source):
        target, wrong = output / path.name, scales_out_of_order(path)
        if wrong:
            tensors = load_file(path)
            tensors |= {name: tensors[name].T.reshape(-1).float() for name in wrong}
            with safe_open(path, framework="pt") as file:
                save_file(tensors, target, metadata=file.metadata())
            print(f"{path.name}: put {len(wrong)} scales back in order, which a forward on the CPU had changed")
            continue
        shutil.copyfile(path, target)
        if is_verified and sha256_of(target) != sha256_of(path):
            raise ValueError(
                f"{target} differs from {path} after copying {path.stat().st_size} bytes. The disk is probably "
                "failing: convert again onto another one."
            )
    index = source / "model.safetensors.index.json"
    if index.is_file():
        write_json(output / index.name, read_json(index))


def scales_out_of_order(path: Path) -> list[str]:
    """Return the scales of a safetensors file that have two dimensions, as the CPU's packing gives them."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(SCALES)]  # noqa: SIM118
        return [name for name in names if len(file.get_slice(name).get_shape()) > 1]


def size_line(checkpoint: Checkpoint, source: Path) -> str:
    """Return the card's line about the weights."""
    num_bytes = sum(path.stat().st_size for path in weights_files(source))
    return f"quantized by {checkpoint.quantization}, {num_bytes / 1e9:.2f} GB"


def add_requirements(folder: Path, method: str) -> None:
    """Add what loads the weights to the handler's requirements.txt.

    Raises:
        ValueError: if the method is none that docs/serving.md describes.
    """
    if method not in REQUIREMENTS:
        raise ValueError(
            f"The weights are quantized by {method!r} and {list_names(REQUIREMENTS)} are known. They were probably "
            "made with another library: quantize as docs/serving.md does, or copy the files by hand."
        )
    path = folder / "requirements.txt"
    write_text(path, path.read_text(encoding="utf-8") + "\n".join(REQUIREMENTS[method]) + "\n")


def describe(config: dict) -> str | None:
    """Return the method of a config.json's quantization, or None."""
    found = config.get("quantization_config")
    return None if found is None else str(found.get("quant_method", json.dumps(found)[:40]))
