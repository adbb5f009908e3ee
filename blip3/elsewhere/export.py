# SPDX-License-Identifier: Apache-2.0
r"""Write a checkpoint as ONNX files, with all that is needed to answer beside them.

    python -m blip3.elsewhere.export . outputs/onnx

    tower.onnx      views (N, 3, S, S)                                       -> patches (N, P, D)
    resampler.onnx  patches (G, V, D), G groups of V visible patches         -> image_tokens (G, Q, E)
    embed.onnx      input_ids (B, L)                                         -> embeddings (B, L, E)
    decoder.onnx    embeddings (B, L, E), attention_mask (B, T + L), position_ids (B, L),
                    key_i and value_i (B, heads, T, width) of every layer i  -> logits (B, L, vocabulary),
                                                                                new_key_i and new_value_i (B, heads, T
                                                                                + L, width)

N, G, V, B, L and T are free, T may be 0. Weights are float32. Files above 2 GB keep theirs in a file beside them
(NAME.onnx.data). Which patches a group has is in tiling_blip3.py; blip3/elsewhere/answer.py puts the four together.
"""

import argparse
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, DynamicCache

from ..checkpoints import code_folder, folder_of, load_model, locate
from ..hub import CODE_FILES, model_code
from ..refusals import install

OPSET = 20
GRAPHS = ("tower", "resampler", "embed", "decoder")


class Tower(nn.Module):
    """The vision tower."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.model

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Encode views (N, 3, S, S) to patches (N, P, D)."""
        outputs = self.model.vision_tower(views, return_dict=True)
        return model_code("towers_blip3.patch_tokens")(
            self.model.vision_tower, outputs, self.model.config
        ).last_hidden_state


class Resampler(nn.Module):
    """The resampler, for groups of equal length."""

    def __init__(self, model: Any):
        super().__init__()
        self.resampler = model.model.resampler

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Resample patches (G, V, D) to image tokens (G, Q, E)."""
        groups, length, _ = patches.shape
        return self.resampler(patches.flatten(0, 1), [(groups, length)])


class Decoder(nn.Module):
    """The language model with its output layer and its cache as plain tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.language_model, self.lm_head = model.language_model, model.lm_head
        self.window = getattr(model.config.text_config, "sliding_window", None)

    def forward(
        self, embeddings: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *cached: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Continue from a cache: logits, then the keys and values of every layer."""
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(cached[::2], cached[1::2], strict=True)):
            cache.update(key, value, layer)
        outputs = model_code("generation_blip3.run_decoder")(
            self.language_model,
            embeddings,
            self._mask(attention_mask, embeddings.shape[1], embeddings.dtype),
            position_ids,
            cache,
            use_cache=True,
            return_dict=True,
        )
        states = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return self.lm_head(outputs.last_hidden_state), *states

    def _mask(self, attention_mask: torch.Tensor, num_new: int, dtype: torch.dtype) -> torch.Tensor:
        """What each new token sees, added to scores: (B, 1, L, T + L)."""
        num_all = attention_mask.shape[1]
        keys = torch.arange(num_all)
        queries = torch.arange(num_new).unsqueeze(-1) + (num_all - num_new)
        sees = keys <= queries
        if self.window is not None:
            sees = sees & (queries - keys < self.window)
        sees = sees & (attention_mask[:, None, None, :] > 0)
        return torch.where(sees, 0.0, torch.finfo(dtype).min).to(dtype)


def export(checkpoint: str | Path, output: str | Path) -> None:
    """Write a checkpoint as ONNX files.

    Args:
        checkpoint: as `checkpoints.locate` takes it.
        output: folder to make.

    Raises:
        ImportError: without onnxscript, which torch's exporter needs.
        ValueError: for a model whose image tokens depend on the prompt.
        FileExistsError: if the folder exists.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Writing ONNX needs the packages onnx and onnxscript, which are not installed. The extra was probably "
            f"left out: run {install('onnx')}."
        ) from error
    located = locate(checkpoint)
    check_exportable(AutoConfig.from_pretrained(**located))
    model = load_model(located | {"attn_implementation": "eager"}, dtype=torch.float32).eval()
    if Path(output).exists():
        raise FileExistsError(
            f"{output} exists already, and a folder of ONNX files is written whole. It was probably made by an "
            "earlier run: remove it or name another."
        )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
        folder = Path(beside) / output.name
        folder.mkdir()
        for name in GRAPHS:
            _write(name, model, folder / f"{name}.onnx")
        copy_small_files(folder_of(checkpoint), folder)
        write_sizes(model, folder)
        folder.rename(output)


def check_exportable(config: Any) -> None:
    """Refuse what the four graphs cannot hold.

    Raises:
        ValueError: for a resampler that reads the prompt.
    """
    queries = config.resampler_config.num_text_queries
    if queries:
        raise ValueError(
            f"The resampler reads {queries} tokens of the prompt, but resampler.onnx takes patches alone. The "
            "checkpoint is probably the first family's instruct model: serve it with transformers."
        )


def copy_small_files(source: Path, output: Path) -> None:
    """Copy configuration, tokenizer, processor and code: all but the weights."""
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and ".index." not in file.name:
            shutil.copy(file, output)
    for name in CODE_FILES:
        shutil.copy(code_folder(source) / name, output)


def write_sizes(model: Any, folder: Path) -> None:
    """Write what answering needs beside graphs and processor."""
    text = model.config.text_config
    stops = model.generation_config.eos_token_id
    sizes = {
        "num_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "stops": stops if isinstance(stops, list) else [stops],
    }
    (folder / "onnx.json").write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def _write(name: str, model: Any, path: Path) -> None:
    """Write one graph."""
    module, inputs, shapes, outputs = _signature(name, model)
    with torch.no_grad():
        program: Any = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    program.save(path, external_data=sum(each.nbytes for each in module.parameters()) > 1.9e9)


def _signature(name: str, model: Any) -> tuple[nn.Module, dict[str, torch.Tensor], Any, list[str]]:
    """Give a graph's module, example inputs by name, which of their axes are free, and names of outputs."""
    config, free = model.config, torch.export.Dim.DYNAMIC
    text, side = config.text_config, config.tile_size
    if name == "tower":
        return Tower(model), {"views": torch.zeros(3, 3, side, side)}, ({0: free},), ["patches"]
    if name == "resampler":
        patches = torch.zeros(3, 5, config.resampler_config.hidden_size)
        return Resampler(model), {"patches": patches}, ({0: free, 1: free},), ["image_tokens"]
    if name == "embed":
        ids = torch.zeros(2, 3, dtype=torch.long)
        return model.get_input_embeddings(), {"input_ids": ids}, ({0: free, 1: free},), ["embeddings"]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows, new, past = 2, 3, 4
    inputs = {
        "embeddings": torch.zeros(rows, new, text.hidden_size),
        "attention_mask": torch.ones(rows, past + new, dtype=torch.long),
        "position_ids": torch.arange(past, past + new).expand(rows, -1),
    }
    axes: list[dict[int, Any]] = [{0: free, 1: free}] * 3
    outputs = ["logits"]
    cached: list[dict[int, Any]] = []
    for layer in range(text.num_hidden_layers):
        for kind in ("key", "value"):
            inputs[f"{kind}_{layer}"] = torch.zeros(rows, text.num_key_value_heads, past, head_dim)
            outputs.append(f"new_{kind}_{layer}")
            cached.append({0: free, 2: free})
    return Decoder(model), inputs, (*axes, tuple(cached)), outputs


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, or owner/name on the Hub")
    parser.add_argument("output", type=Path, help="folder to make")
    args = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        export(args.model, args.output)
    except (FileNotFoundError, FileExistsError, ImportError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
