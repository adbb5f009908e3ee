# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint needs in memory, by dtype: computed from its configuration, measured on request.

python -m blip3.serving.memory                        the 4B architecture of configs/4b; no weights are read
python -m blip3.serving.memory --model FOLDER         any other
python -m blip3.serving.memory --model FOLDER --measure bfloat16  the peak of loading and of one answer, on this CPU
python -m blip3.serving.memory --write-zeros FOLDER   weights of zeros in true size, in a sparse file, to measure with

weights        parameters x bytes; int8 and nf4 hold the language model's linear layers in 1 and 1/2 byte, with a
               float32 scale for each row (int8) or 64 weights (nf4), and all the rest in bfloat16
a token        2 (key, value) x layers x key-value heads x head width x bytes
an image      (1 + tiles) x latents tokens, with `token_sampling: fixed` latents alone
a full context max_position_embeddings tokens; transformers' own cache stops at sliding_window - 1
"""

import argparse
import dataclasses
import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ..checkpoints import code_folder, folder_of, locate
from ..hub import RELEASE, ROOT, model_code

BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.5}
SCALE_BYTES, NF4_BLOCK = 4, 64
GIB, MIB, KIB = 2**30, 2**20, 2**10
MEASURE = """
import json, sys, threading, torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText
from PIL import Image

def resident():
    lines = [line.split() for line in open("/proc/self/status") if line.startswith("Rss")]
    kib = {line[0]: int(line[1]) for line in lines}
    return 1024 * kib["RssAnon:"], 1024 * (kib["RssAnon:"] + kib["RssFile:"])

def watch():
    while not done.wait(0.01):
        peaks.append(resident())

def peak():
    return [max(column) - start for column, start in zip(zip(*peaks, resident()), before)]

source, dtype, num_tokens = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
processor = AutoImageProcessor.from_pretrained(**source)
before, peaks, done = resident(), [], threading.Event()
threading.Thread(target=watch, daemon=True).start()
model = AutoModelForImageTextToText.from_pretrained(**source, dtype=getattr(torch, dtype)).eval()
print(json.dumps({"loading": peak()}))
if not num_tokens:
    sys.exit()
side = 2 * processor.tile_size
pixels = processor(Image.new("RGB", (side, side), "teal"), return_tensors="pt").to(model.dtype)
num_read = model.model.count_image_tokens(tuple(pixels["image_sizes"][0].tolist()))
ids = torch.full((1, num_read), model.config.image_token_id)
if model.config.resampler_config.num_text_queries:
    pixels["query_ids"] = ids[:, :1]
ids = model.generate(ids, **pixels, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
done.set()
print(json.dumps({"answering": peak(), "tokens": [num_read, ids.shape[1] - num_read]}))
"""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a checkpoint needs.

    Attributes:
        num_parameters: in all.
        num_text: of them in the linear layers of the language model, which quantization stores smaller.
        num_text_rows: output rows of those layers.
        values_per_token: keys and values of one token in all layers.
        image_tokens: fewest and most tokens an image takes.
        context: tokens the model reads.
    """

    num_parameters: int
    num_text: int
    num_text_rows: int
    values_per_token: int
    image_tokens: tuple[int, int]
    context: int

    def weight_bytes(self, kind: str) -> float:
        """Bytes of the weights as one of `BYTES`."""
        if kind in ("float32", "bfloat16"):
            return self.num_parameters * BYTES[kind]
        num_scales = self.num_text_rows if kind == "int8" else math.ceil(self.num_text / NF4_BLOCK)
        rest = (self.num_parameters - self.num_text) * BYTES["bfloat16"]
        return self.num_text * BYTES[kind] + num_scales * SCALE_BYTES + rest

    def token_bytes(self, kind: str) -> float:
        """Bytes of one token in the cache, which stays in the dtype of the activations."""
        return self.values_per_token * BYTES["float32" if kind == "float32" else "bfloat16"]


def build_empty(config: Any) -> torch.nn.Module:
    """Build the model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=True)


def is_text_linear(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether quantization as docs/serving.md does it stores this parameter smaller."""
    return ".language_model." in name and "embed_tokens" not in name and parameter.ndim == 2


def needs_of(config: Any) -> Needs:
    """Compute what a configuration needs."""
    parameters = dict(build_empty(config).named_parameters())
    linear = [parameter for name, parameter in parameters.items() if is_text_linear(name, parameter)]
    text, resampler = config.text_config, config.resampler_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    list_counts = model_code("tiling_blip3.list_image_token_counts")
    counts = list_counts(config.tile_grids, resampler.num_latents, resampler.token_sampling)
    return Needs(
        num_parameters=sum(parameter.numel() for parameter in parameters.values()),
        num_text=sum(parameter.numel() for parameter in linear),
        num_text_rows=sum(len(parameter) for parameter in linear),
        values_per_token=2 * text.num_hidden_layers * text.num_key_value_heads * head_dim,
        image_tokens=(counts[0], counts[-1]),
        context=text.max_position_embeddings,
    )


def table(needs: Needs) -> str:
    """Write what is needed as a Markdown table."""

    def row(name: str, unit: int, suffix: str, values: list[float]) -> str:
        digits = 2 if unit == GIB else 0
        return f"| {name} | " + " | ".join(f"{value / unit:.{digits}f} {suffix}" for value in values) + " |"

    low, high = needs.image_tokens
    tokens = [needs.token_bytes(kind) for kind in BYTES]
    is_small = needs.num_parameters * 4 < GIB
    unit, suffix = (MIB, "MiB") if is_small else (GIB, "GiB")
    return "\n".join(
        [
            f"| {needs.num_parameters:,} parameters | " + " | ".join(BYTES) + " |",
            "|---|" + "---|" * len(BYTES),
            row("weights", unit, suffix, [needs.weight_bytes(kind) for kind in BYTES]),
            row("cache, a token", KIB, "KiB", tokens),
            row(f"cache, an image of {low} tokens", MIB, "MiB", [low * token for token in tokens]),
            row(f"cache, an image of {high} tokens", MIB, "MiB", [high * token for token in tokens]),
            row(
                f"cache, a context of {needs.context} tokens", MIB, "MiB", [needs.context * token for token in tokens]
            ),
        ]
    )


def write_zeros(source: str | Path, output: Path) -> None:
    """Write a checkpoint whose weights are zeros, in a file that takes no disk.

    Args:
        source: a folder with the configuration, tokenizer and code.
        output: to make.

    Raises:
        FileExistsError: if it exists.
    """
    located = locate(source, only_small_files=True)
    folder = folder_of(source, only_small_files=True)
    if output.exists():
        raise FileExistsError(
            f"{output} exists, but a checkpoint of zeros needs a new folder. An earlier one was probably written "
            "there: remove it, or name another."
        )
    output.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix in (".json", ".jinja") and "index" not in file.name:
            shutil.copy(file, output)
    for file in code_folder(folder).glob("*_blip3.py"):
        shutil.copy(file, output)
    config = AutoConfig.from_pretrained(**located)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, parameter in build_empty(config).named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (output / "model.safetensors").open("wb") as weights:
        weights.write(struct.pack("<Q", len(text)) + text)
        weights.truncate(8 + len(text) + end)


def measure(folder: str | Path, dtype: str, num_tokens: int = 16) -> dict[str, list[int]]:
    """Load a checkpoint and answer about an image of four tiles, in a process of its own.

    Args:
        folder: a checkpoint; its tokenizer is not needed.
        dtype: to load it in.
        num_tokens: to write; 0 only loads.

    Returns:
        Peaks above what the process took before, of `loading` and of all until the end of `answering`: bytes of its
        own, and bytes with the mapped pages of files, which the system may drop; `tokens` read and written.

    Raises:
        RuntimeError: with the process's last words.
    """
    command = [sys.executable, "-c", MEASURE, json.dumps(locate(folder)), dtype, str(num_tokens)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"Loading {folder} in {dtype} failed. Its last words:\n{run.stderr[-1500:]}")
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {name: values for line in lines for name, values in line.items()}


def main() -> None:
    """Print the table, and what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ROOT / RELEASE, help="folder or owner/name (default: the 4B architecture)")
    parser.add_argument("--measure", nargs="+", choices=("float32", "bfloat16"), default=[], help="dtypes to load")
    parser.add_argument("--tokens", type=int, default=16, help="to write; 0 only loads (default: %(default)s)")
    parser.add_argument("--write-zeros", type=Path, metavar="FOLDER", help="make a checkpoint of zeros, and stop")
    options = parser.parse_args()
    try:
        located = locate(options.model, only_small_files=True)
        if options.write_zeros:
            return write_zeros(options.model, options.write_zeros)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(table(needs_of(AutoConfig.from_pretrained(**located))))
    for dtype in options.measure:
        found = measure(options.model, dtype, options.tokens)
        for name in ("loading", "answering")[: 1 + bool(options.tokens)]:
            own, mapped = (size / MIB for size in found[name])
            print(f"{dtype}, {name}: {own:.0f} MiB, {mapped:.0f} MiB with mapped files")
    return None


if __name__ == "__main__":
    main()
