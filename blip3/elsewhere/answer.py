# SPDX-License-Identifier: Apache-2.0
r"""Answer with the ONNX files of export.py: onnxruntime in place of torch, greedy, one prompt at a time.

    python -m blip3.elsewhere.answer outputs/onnx "How many grey umbrellas are there?" \
        --images examples/images/count-0.png

What is left of Python is what a program in another language would have to do, too: choose the patches of each group,
put image tokens where the prompt has places for them, and pass the cache on.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoProcessor

from ..answering import render_question
from ..checkpoints import locate
from ..hub import model_code
from ..refusals import install


class OnnxModel:
    """The graphs of a folder.

    Args:
        folder: that `export` wrote.
        threads: of onnxruntime; 0 for its own choice.

    Raises:
        ImportError: without onnxruntime.
    """

    def __init__(self, folder: str | Path, threads: int = 0):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"{folder} holds ONNX files, which need the package onnxruntime, and it is not installed. The extra "
                f"was probably left out: run {install('onnx')}."
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.config: Any = AutoConfig.from_pretrained(**locate(folder))
        self.sizes = json.loads((Path(folder) / "onnx.json").read_text(encoding="utf-8"))
        self.tower, self.resampler, self.embed, self.decoder = (
            onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
            for name in ("tower", "resampler", "embed", "decoder")
        )

    def image_tokens(self, pixel_values: np.ndarray, image_sizes: np.ndarray) -> np.ndarray:
        """Encode images, scaled or as bytes: (I, T, 3, S, S) and (I, 2) to (n, E), end to end."""
        if pixel_values.dtype.kind != "f":
            scaling = (getattr(self.config, name) for name in ("rescale_factor", "image_mean", "image_std"))
            pixel_values = model_code("tiling_blip3.scale_pixels")(pixel_values.astype(np.float32), *scaling)
        tokens = [
            self._encode(views, tuple(size)) for views, size in zip(pixel_values, image_sizes.tolist(), strict=True)
        ]
        return np.concatenate(tokens)

    def _encode(self, views: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Encode one image; groups of equal length go through the resampler together."""
        config, rules = self.config, self.config.resampler_config
        grid = model_code("tiling_blip3.grid_of")(size, config.tile_grids, config.tile_size)
        views = views[: model_code("tiling_blip3.count_views")(grid)]
        (patches,) = self.tower.run(None, {"views": views})
        groups = model_code("tiling_blip3.visible_patches")(
            size, grid, config.patches_per_side, rules.token_sampling, rules.tile_grouping, rules.hide_padding
        )
        flat = patches.reshape(-1, patches.shape[-1])
        found: dict[int, np.ndarray] = {}
        order = sorted(range(len(groups)), key=lambda number: len(groups[number]))
        for _, numbers in groupby(order, key=lambda number: len(groups[number])):
            run = list(numbers)
            (tokens,) = self.resampler.run(
                None, {"patches": np.stack([flat[groups[number].numpy()] for number in run])}
            )
            found |= dict(zip(run, tokens, strict=True))
        return np.concatenate([found[number] for number in range(len(groups))])

    def generate(self, inputs: Any, max_new_tokens: int) -> list[int]:
        """Answer one prompt greedily.

        Args:
            inputs: of the processor, for one row: `input_ids`, with images also `pixel_values` and `image_sizes`.
            max_new_tokens: most to write.

        Returns:
            the new ids, with the one that ends them.
        """
        ids = np.asarray(inputs["input_ids"])
        (embeddings,) = self.embed.run(None, {"input_ids": ids})
        if "pixel_values" in inputs:
            tokens = self.image_tokens(np.asarray(inputs["pixel_values"]), np.asarray(inputs["image_sizes"]))
            embeddings[ids == self.config.image_token_id] = tokens
        cache, new, length = self._empty_cache(), [], ids.shape[1]
        while True:
            logits, *cache = self._step(embeddings, cache, length)
            new.append(int(logits[0, -1].argmax()))
            if new[-1] in self.sizes["stops"] or len(new) == max_new_tokens:
                return new
            (embeddings,) = self.embed.run(None, {"input_ids": np.array([[new[-1]]])})
            length += 1

    def _step(self, embeddings: np.ndarray, cache: list[np.ndarray], length: int) -> list[np.ndarray]:
        names = [f"{kind}_{layer}" for layer in range(self.sizes["num_layers"]) for kind in ("key", "value")]
        positions = np.arange(length - embeddings.shape[1], length)[None]
        given = {"embeddings": embeddings, "attention_mask": np.ones((1, length), np.int64), "position_ids": positions}
        return self.decoder.run(None, given | dict(zip(names, cache, strict=True)))

    def _empty_cache(self) -> list[np.ndarray]:
        shape = (1, self.sizes["num_key_value_heads"], 0, self.sizes["head_dim"])
        return [np.zeros(shape, np.float32)] * (2 * self.sizes["num_layers"])


def main() -> None:
    """Read the command line and print the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that `export` wrote")
    parser.add_argument("question", help="with <image> where images belong, or without: then they come first")
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="files, in their order")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="most to write (default: %(default)s)")
    args = parser.parse_args()
    try:
        model = OnnxModel(args.folder)
    except (FileNotFoundError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    processor = AutoProcessor.from_pretrained(**locate(args.folder))
    text = render_question(processor, args.question, len(args.images))
    inputs = processor(text=text, images=[str(path) for path in args.images] or None, return_tensors="pt")
    print(processor.decode(model.generate(inputs, args.max_new_tokens), skip_special_tokens=True))


if __name__ == "__main__":
    main()
