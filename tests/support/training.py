# SPDX-License-Identifier: Apache-2.0
"""What the training tests share: tiny sizes, tiny recipes, and the losses a run logged."""

import json
from pathlib import Path

import yaml
from safetensors.torch import load_file

from blip3.data.records import Record, Turn, write_jsonl
from blip3.training.recipe import Recipe, load_recipe
from blip3.training.small.new_model import make_model

WORLD = {"sides": [48, 96], "document_sides": [160, 200], "fonts": ["Aileron"], "ocr_strings": [1, 2]}
SIZES = {
    "vocab_size": 512,
    "tile_grids": [[2, 1], [1, 2]],
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 12,
    },
    "resampler_config": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "num_latents": 4,
        "tile_grouping": "tiles",
    },
    "text_config": {
        "model_type": "phi3",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "sliding_window": None,
    },
    "world": "world.yaml",
}
RECIPE = {
    "world": WORLD,
    "mixture": [{"rendered": "name"}, {"rendered": "compare"}],
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "max_length": 256,
    "log_every": 1,
    "save_every": 3,
}


def write_sizes(folder: Path) -> Path:
    """Write the YAML files that `new_model` takes."""
    (folder / "world.yaml").write_text(yaml.safe_dump(WORLD))
    (folder / "model.yaml").write_text(yaml.safe_dump(SIZES))
    return folder / "model.yaml"


def make_small_model(folder: Path) -> Path:
    """Make a model of 0.1 million parameters with its tokenizer and processor."""
    make_model(write_sizes(folder), folder / "new", samples=20)
    return folder / "new"


def write_recipe(path: Path, model: Path, **changes: object) -> Path:
    """Write a recipe whose run goes to a folder beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"model": str(model), "output": str(path.with_suffix("")), **RECIPE, **changes}
    path.write_text(yaml.safe_dump(values))
    return path


def tiny_recipe(path: Path, model: Path, **changes: object) -> Recipe:
    """Write a recipe and load it."""
    return load_recipe(write_recipe(path, model, **changes), Recipe)


def write_conversations(path: Path) -> str:
    """Write a file of conversations without images, so that some batches have none."""
    turns = [(Turn("user", f"What follows {n}?"), Turn("assistant", f"It is {n + 1}.")) for n in range(8)]
    write_jsonl((Record(f"t{n}", "instruction", (), each) for n, each in enumerate(turns)), path)
    return str(path)


def newest_checkpoint(output: Path) -> Path:
    return max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def losses_of(output: Path) -> list[float]:
    """Losses of every logged step, from the newest checkpoint."""
    history = json.loads((newest_checkpoint(output) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def share_of_loss_left(output: Path, num_steps: int) -> float:
    """Give the mean loss of a run's last three steps over that of its first three; every step has to be logged."""
    losses = losses_of(output)
    assert len(losses) == num_steps
    return sum(losses[-3:]) / sum(losses[:3])


def weights_in(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")
