# SPDX-License-Identifier: Apache-2.0
r"""Check that a shipped checkpoint is whole and gives what it gave when it was written.

    python -m blip3.evaluation.golden [FOLDER ...]       without folders: the small model and its base
    python -m blip3.evaluation.golden --write FOLDER

    FOLDER/golden.safetensors   of fixed prompts: token ids, pixel values and logits, the last two as projections; in
                                its metadata the sha256 of each weight file

What differs first tells where to look: a weight file, the tokenizer and processor, the image processor, or the model.
The file belongs to its weights: nothing copies it to another folder, and `blip3 publish` writes a new one.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor

from ..checkpoints import CODE_FILES, GOLDEN_FILE, folder_of, load_model, locate
from ..files import sha256_of
from ..hub import ROOT
from ..images import float_options

SHIPPED = (ROOT, ROOT / "base", ROOT / "post_trained")
# Largest difference of a value, where logits spread by about 1.5. Seen: 3e-6 between transformers 4.57.6 and 5.24 and
# one and two threads, 1e-5 between eager and SDPA attention; 0.06 where one tensor of the resampler is 5 % larger.
TOLERANCE = 1e-3
PARTS = {  # of a prompt, in the order they are compared; what is probably to blame for a difference
    "ids": "the tokenizer or the processor",
    "pixels": "the image processor",
    "logits": "the model",
    "top_logits": "the model",
}
NUM_DIRECTIONS, NUM_TOP = 8, 16
CHAT = {"text": ("What is 2 + 3?", 0), "one_image": ("What colour is it?", 1), "two_images": ("Which is larger?", 2)}
DOCUMENTS = {
    "text": ("Things: red car, blue", 0),
    "one_image": ("<image>From left to right:", 1),
    "two_images": ("<image>Things: red car.<|endofchunk|><image>Things:", 2),
    "few_shot": ("<image>one<|endofchunk|><image>two<|endofchunk|><image>", 3),
}
IMAGE_SIZES = ((120, 90), (64, 200), (310, 150))  # (height, width) of the images of a prompt, in order


def fixed_image(height: int, width: int) -> Image.Image:
    """Compute an image that needs no file and no random numbers: waves of another length in each channel."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / length + columns / (length + 4)) for length in (5, 9, 17)]
    return Image.fromarray((127.5 + 127.5 * np.stack(waves, axis=-1)).astype(np.uint8))


def project(values: torch.Tensor) -> torch.Tensor:
    """Project rows onto fixed directions, so that a few numbers depend on all of them.

    Args:
        values: (N, D).

    Returns:
        (N, `NUM_DIRECTIONS`), of about the size of a value of a row.
    """
    steps = torch.arange(1, values.shape[1] + 1, dtype=torch.float64)
    frequencies = torch.arange(1, NUM_DIRECTIONS + 1, dtype=torch.float64) * (5**0.5 - 1) / 2
    directions = torch.cos(steps[:, None] * frequencies * steps[:, None] ** 0.5)
    return (values.double() @ directions / values.shape[1] ** 0.5).float()


@torch.inference_mode()
def compute(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    """Give the golden tensors of a model: of each prompt of L tokens and V views, in the order they are compared.

    Args:
        model: in float32.
        processor: chat prompts if it has a chat template, else documents.

    Returns:
        `PROMPT.ids` (L) int32; `PROMPT.pixels` (V, `NUM_DIRECTIONS`) if it has images; `PROMPT.logits`
        (L, `NUM_DIRECTIONS`); `PROMPT.top_logits` (`NUM_TOP`), the largest of the last token, descending.
    """
    found = {}
    for name, (text, num_images) in (CHAT if processor.chat_template else DOCUMENTS).items():
        images = [fixed_image(*size) for size in IMAGE_SIZES[:num_images]]
        if processor.chat_template:
            content = [*([{"type": "image"}] * num_images), {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        options = float_options(processor) if images else {}
        inputs = processor(text=text, images=images or None, return_tensors="pt", **options)
        logits = model(**inputs).logits[0].float()
        found[f"{name}.ids"] = inputs["input_ids"][0].to(torch.int32)
        if images:
            pixels = inputs["pixel_values"].float()
            found[f"{name}.pixels"] = project(pixels.reshape(-1, pixels.shape[-3:].numel()))
        found[f"{name}.logits"] = project(logits)
        found[f"{name}.top_logits"] = logits[-1].topk(NUM_TOP).values
    return found


def checksums(folder: Path) -> dict[str, str]:
    """Give the sha256 of each weight file, as hexadecimal digits, by name."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("model*.safetensors"))}


def write_golden(folder: Path, code: Path | None = None) -> Path:
    """Write the golden tensors of a checkpoint beside its weights.

    Args:
        folder: of a checkpoint.
        code: folder with the model's code, if it is neither the checkpoint's nor above it.

    Returns:
        the file.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no weight file in it.
    """
    folder = folder_of(folder)
    sums = checksums(folder)
    if not sums:
        raise FileNotFoundError(
            f"{folder} has no model*.safetensors, but golden tensors are made from a checkpoint's weights. They were "
            "probably not downloaded: download them, or name the folder that holds them."
        )
    tensors = _compute_with_code(folder, code) if code else compute(*_load(folder))
    path = folder / GOLDEN_FILE
    save_file(tensors, path, metadata={"format": "pt", "sha256": json.dumps(sums)})
    return path


def check_golden(folder: Path) -> str:
    """Compare a checkpoint with its golden tensors.

    Args:
        folder: of a checkpoint.

    Returns:
        a line that says what was compared.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no golden tensors beside it.
        ValueError: if something differs, naming what differs first.
    """
    folder = folder_of(folder)
    path = folder / GOLDEN_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {GOLDEN_FILE}, with which its weights and outputs are compared. Only published models "
            f"have one; a conversion does not carry it. If the checkpoint is yours and known to be right, write one: "
            f"blip3 verify --write {folder}"
        )
    expected, sums = _read(path)
    _compare_checksums(folder, sums)
    found = compute(*_load(folder))
    names = sorted(expected, key=lambda name: list(PARTS).index(_part(name)))
    worst = max(_difference(folder, name, found.get(name), expected[name]) for name in names)
    return f"{folder}: {len(sums)} weight files and {len(expected)} tensors agree (differences up to {worst:.1g})"


def _load(folder: Path) -> tuple[Any, Any]:
    """Load model and processor as a user does, on the CPU in float32."""
    source = locate(folder)
    model = load_model(source, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(**source)


def _compute_with_code(folder: Path, code: Path) -> dict[str, torch.Tensor]:
    """Compute with code from elsewhere: in a folder of links to the checkpoint's files and to the code."""
    with tempfile.TemporaryDirectory(prefix="blip3-golden-") as scratch:
        files = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")]
        for path in (*files, *(code / name for name in CODE_FILES)):
            (Path(scratch) / path.name).symlink_to(path.resolve())
        return compute(*_load(Path(scratch)))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read golden tensors, and the checksums of weight files by name."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["sha256"])  # noqa: SIM118


def _compare_checksums(folder: Path, expected: dict[str, str]) -> None:
    """Refuse weight files other than those that the golden tensors were made from.

    Raises:
        ValueError: naming the first.
    """
    found = checksums(folder)
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"The weight file {folder / name} has sha256 {found.get(name, 'none, as it is missing')} but "
                f"{GOLDEN_FILE} was written with {expected.get(name, 'no such file')}. The file is probably damaged, "
                "half downloaded or another checkpoint's: download it again, or from a clone, check it out again."
            )


def _part(name: str) -> str:
    return name.rpartition(".")[2]


def _difference(folder: Path, name: str, found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Give the largest difference of a tensor.

    Raises:
        ValueError: if it is larger than `TOLERANCE`, or if ids or shapes differ.
    """
    if found is None or found.shape != expected.shape:
        difference = f"shape {tuple(found.shape)}" if found is not None else "no such tensor"
        expectation = f"shape {tuple(expected.shape)}"
    else:
        largest = (found.double() - expected.double()).abs().max().item()
        if largest <= (0 if _part(name) == "ids" else TOLERANCE):
            return largest
        difference, expectation = f"a difference of {largest:.3g}", f"0 for ids, else at most {TOLERANCE:g}"
    raise ValueError(
        f"{name} of {folder} has {difference} but {GOLDEN_FILE} expects {expectation}. The weight files are those "
        f"that it was written with, so {PARTS[_part(name)]} probably changed, by its code, its configuration or "
        "the version of a package: compare these with the release that wrote the file."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="default: the small model, its base")
    parser.add_argument("--write", action="store_true", help="write golden tensors instead of comparing with them")
    args = parser.parse_args(arguments)
    status = 0
    for folder in args.folders or SHIPPED:
        try:
            print(f"wrote {write_golden(folder)}" if args.write else check_golden(folder))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
