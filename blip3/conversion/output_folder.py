# SPDX-License-Identifier: Apache-2.0
"""OUTPUT's files: what is written, and how it is verified.

In: a `Checkpoint` and the `View`s planned for it. Out: the files of a complete repository of the Hub.
"""

import argparse
import hashlib
from pathlib import Path

import torch
from tqdm import tqdm

from ..checkpoints import CODE_FILES
from ..files import write_json
from ..hub import RELEASE, ROOT, files_behind, source_of
from ..refusals import list_names
from .card import has_path, without_paths, write_attributes, write_card
from .configs import (
    TEMPLATES,
    Checkpoint,
    build_config,
    read_json,
    scaling_of,
    template,
    unfused_text_config,
)
from .names import Shapes, to_ours, to_released
from .sources import open_reader
from .tensors import (
    View,
    Views,
    chunks,
    progress_bar,
    shapes_of,
    split_text,
    total_bytes,
    views_of,
    write_safetensors,
)
from .tokenizer_files import copy_files, stop_ids, write_tokenizer

ENDPOINT_FILES = ("requirements.txt", *files_behind("handler.py"))
# -- Weights ----------------------------------------------------------------------------------------------------------


def plan_ours(checkpoint: Checkpoint, text_layout: str) -> Views:
    """Return the tensors of our folder under our names, in the requested text layout, `fused` or `unfused`."""
    views = checkpoint.views
    if text_layout == "unfused":
        views = split_text(views, checkpoint.config["text_config"])
    return {to_ours(name): view for name, view in views.items()}


def group_shards(views: Views, max_bytes: int) -> list[Views]:
    """Cut the plan, in its order, into shards of at most `max_bytes` (a larger tensor gets its own)."""
    shards: list[Views] = [{}]
    size = 0
    for name, view in views.items():
        if shards[-1] and size + view.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = view
        size += view.num_bytes
    return shards


def write_shards(folder: Path, views: Views, max_bytes: int, progress: tqdm) -> None:
    """Write model.safetensors, or shards of at most `max_bytes` with their index.

    Raises:
        ValueError: if a value does not fit the dtype asked for.
    """
    shards = group_shards(views, max_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", views, progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, progress)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total_bytes(views)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


# -- Small files ------------------------------------------------------------------------------------------------------


def write_small_files(
    folder: Path, checkpoint: Checkpoint, text_layout: str, dtype: str, size: str, args: argparse.Namespace
) -> dict:
    """Write code, configs, tokenizer and card; return the written config.

    Args:
        folder: where to write.
        checkpoint: what to describe.
        text_layout: `fused` or `unfused`.
        dtype: that the config names.
        size: the card's line about the weights.
        args: the command line, for the card.

    Raises:
        FileNotFoundError: if this repository lacks a file that every output carries.
        ValueError: if the tokenizer is another model's, or the config is refused.
    """
    missing = [name for name in (*CODE_FILES, *ENDPOINT_FILES) if not source_of(name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{ROOT} lacks {list_names(missing)}, which every OUTPUT carries. The clone is probably incomplete: "
            "restore the files from version control."
        )
    for name in ENDPOINT_FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    copy_files(folder, {name: source_of(name) for name in (*CODE_FILES, *ENDPOINT_FILES, "LICENSE")})
    chat_template = _chat_template(checkpoint)
    if chat_template is not None:
        copy_files(folder, {chat_template.name: chat_template})
    ids = stop_ids(checkpoint, write_tokenizer(folder, checkpoint))
    text = checkpoint.config["text_config"]
    if not checkpoint.is_ours:
        eos = ids["eos_token_id"]
        text = text | ids | {"eos_token_id": eos[0] if isinstance(eos, list) else eos}
    config = without_paths(checkpoint.config | {"dtype": dtype, "auto_map": template()["auto_map"]})
    config |= scaling_of(checkpoint.preprocessor)
    config["text_config"] = unfused_text_config(text) if text_layout == "unfused" else text
    build_config(config)  # validates
    write_json(folder / "config.json", config)
    generation = read_json(_template(checkpoint, "generation_config.json"))
    write_json(folder / "generation_config.json", generation | ids)
    write_json(folder / "preprocessor_config.json", checkpoint.preprocessor)
    processor = {key: config["resampler_config"][key] for key in ("num_latents", "token_sampling")}
    if config["resampler_config"].get("num_text_queries"):
        processor["num_text_queries"] = config["resampler_config"]["num_text_queries"]
    write_json(folder / "processor_config.json", read_json(TEMPLATES / "processor_config.json") | processor)
    write_card(folder, checkpoint, args, size)
    write_attributes(folder)
    return config


def write_original_files(folder: Path, files: dict[str, Path]) -> None:
    """Copy the source's small files, kept for the way back, without paths of the machine they were written on."""
    copy_files(folder, files)
    for name in files:
        if name.endswith(".json") and has_path((folder / name).read_text(encoding="utf-8")):
            write_json(folder / name, without_paths(read_json(folder / name)))


def _template(checkpoint: Checkpoint, name: str) -> Path:
    """Return the file of the source, of the folder it was trained from, or of this repository."""
    return next(folder / name for folder in checkpoint.template_folders if (folder / name).is_file())


def _chat_template(checkpoint: Checkpoint) -> Path | None:
    """Return the chat template; a folder of ours that has processor files but no template was not trained to chat."""
    if checkpoint.variant != "instruct":
        return None
    path = _template(checkpoint, "chat_template.jinja")
    has_processor = _template(checkpoint, "processor_config.json").parent != TEMPLATES
    return None if checkpoint.is_ours and has_processor and path.parent == TEMPLATES else path


# -- Verifying --------------------------------------------------------------------------------------------------------


def verify_bits(folder: Path, views: Views) -> None:
    """Compare every written tensor, bit for bit, with a new read and transform of the source.

    Raises:
        ValueError: on a difference.
    """
    written = views_of(open_reader(folder))
    if set(written) != set(views):
        raise ValueError(
            f"{folder} holds {len(written)} tensors and {len(views)} were planned "
            f"({list_names(set(written) ^ set(views))} differ). The disk is probably failing: "
            "convert again onto another one."
        )
    with progress_bar(total_bytes(views), "verify") as progress:
        for name, view in views.items():
            same_header = (written[name].dtype, written[name].shape) == (view.dtype, view.shape)
            if not same_header or _digest(written[name]) != _digest(view):
                raise ValueError(
                    f"{name} read back from {folder} differs from the source after the transform. The source changed "
                    "meanwhile or the disk is failing: convert again."
                )
            progress.update(view.num_bytes)
    print(f"verified {len(views)} tensors bit for bit")


def _digest(view: View) -> bytes:
    digest = hashlib.blake2b()
    for chunk in chunks(view):
        digest.update(chunk.data)
    return digest.digest()


def model_shapes(config: dict) -> Shapes:
    """Build the model of a config without memory and return its tensors' names (4.57 layout) and shapes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config_class = type(AutoConfig.from_pretrained(ROOT, subfolder=RELEASE, trust_remote_code=True))
    model_config = build_config(config, config_class)
    model_config.auto_map = config["auto_map"]
    model_config._name_or_path = str(ROOT)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config, trust_remote_code=True)
    return {to_ours(to_released(name)): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def verify_model(config: dict, views: Views) -> None:
    """Compare names and shapes with the model itself.

    Args:
        config: the written config.json.
        views: what was written, by our names.

    Raises:
        ValueError: on a difference.
    """
    expected, planned = model_shapes(config), shapes_of(views)
    wrong = [name for name in expected.keys() | planned.keys() if expected.get(name) != planned.get(name)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors differ between the plan ({len(views)}) and the model of the written config "
            f"({len(expected)}): {list_names(wrong)}. convert_weights.py and modeling_blip3.py are probably of two "
            "versions: update both."
        )
    print(f"verified names and shapes of {len(expected)} tensors against the model")
