# SPDX-License-Identifier: Apache-2.0
"""OUTPUT: what is written, how it replaces an earlier output at once, and how it is verified.

In: a `Checkpoint` and the `View`s planned for it. Out: a folder, complete or not there at all: everything is written
to a hidden folder beside it, flushed to disk and renamed.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import CODE_FILES
from conversion.configs import (
    REPOSITORY,
    Checkpoint,
    build_config,
    optional_json,
    read_json,
    unfused_text_config,
    write_json,
    write_text,
)
from conversion.names import Shapes, some, to_ours, to_released
from conversion.sources import open_reader
from conversion.tensors import (
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
from conversion.tokenizer_files import copy_files, present_files, stop_ids, write_tokenizer

DOOR_FILES = (  # handler.py and what it imports
    "handler.py",
    "requirements.txt",
    "checkpoints.py",
    "serving/__init__.py",
    "serving/bodies.py",
    "serving/pictures.py",
)
MARK = "Written by `convert_weights.py`"
MODEL_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [blip3, xgen-mm, multimodal, custom_code]
---

# BLIP-3 (xGen-MM r-v1.5)

    from transformers import AutoModelForImageTextToText, AutoProcessor
    processor = AutoProcessor.from_pretrained(PATH, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(PATH, trust_remote_code=True, dtype="auto")

{mark} from `{source}`. The weights keep their original licence.
"""
ORIGINAL_CARD = """# BLIP-3 (xGen-MM r-v1.5), original layout

{mark} --to-original from `{source}`. The weights keep their original licence.
"""

# -- Replacing an earlier output --------------------------------------------------------------------------------------


def is_our_output(folder: Path) -> bool:
    """Tell whether a folder may be replaced: written by this script, and no working tree.

    Raises:
        ValueError: if its config.json is not JSON.
    """
    config, card = optional_json(folder / "config.json"), folder / "README.md"
    if config is None or config.get("model_type") not in ("blip3", "xgenmm") or not card.is_file():
        return False
    is_tree = (folder / ".git").exists() or (folder / "convert_weights.py").exists()
    return MARK in card.read_text(encoding="utf-8") and not is_tree


def prepare_output(output: Path, sources: list[Path]) -> None:
    """Recover from a killed run, then refuse an OUTPUT that is not ours to replace.

    Raises:
        ValueError: if OUTPUT is something else, or holds a source.
    """
    partial, old = _siblings(output)
    if partial.exists():
        shutil.rmtree(partial)
    if old.exists() and not output.exists():
        old.rename(output)
    elif old.exists():
        shutil.rmtree(old)
    for source in sources:
        if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
            raise ValueError(
                f"OUTPUT {output} is, or holds, the source {source}, which would be replaced by the result. "
                "A path was probably given twice: choose another OUTPUT."
            )
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not is_our_output(output)):
        raise ValueError(
            f"OUTPUT {output} exists and was not written by this script; only an empty folder or an earlier output "
            "is replaced. The path is probably wrong: choose another OUTPUT, or remove it yourself."
        )


def check_space(output: Path, num_bytes: int) -> None:
    """Refuse to start what cannot end for lack of disk.

    Raises:
        ValueError: if the disk of OUTPUT has less than `num_bytes` free.
    """
    parent = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"OUTPUT needs {num_bytes / 2**30:.1f} GiB and {parent} has {free / 2**30:.1f} GiB free. An earlier "
            "output is only removed after the new one is complete: free some space or choose another disk."
        )


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, renamed to `output` at the end. A kill leaves the old output, or none."""
    partial, old = _siblings(output)
    partial.mkdir(parents=True)
    try:
        yield partial
        _fsync_folder(partial)
        if output.exists():
            output.rename(old)
        partial.rename(output)
        _fsync_folder(output.absolute().parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _siblings(output: Path) -> tuple[Path, Path]:
    output = output.absolute()
    return output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.old")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# -- Weights ----------------------------------------------------------------------------------------------------------


def plan_ours(checkpoint: Checkpoint, text_layout: str) -> Views:
    """Return the tensors of our folder under our names, in the requested text layout, `phi3` or `unfused`."""
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


def write_small_files(folder: Path, checkpoint: Checkpoint, text_layout: str, views: Views) -> dict:
    """Write code, configs, tokenizer and card; return the written config.

    Args:
        folder: where to write.
        checkpoint: what to describe.
        text_layout: `phi3` or `unfused`.
        views: what will be written, by our names; the embedding's dtype becomes the config's.

    Raises:
        FileNotFoundError: if this repository lacks a file that every output carries.
        ValueError: if the tokenizer is another model's, or the config is refused.
    """
    missing = [name for name in (*CODE_FILES, *DOOR_FILES) if not (REPOSITORY / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{REPOSITORY} lacks {some(missing)}, which every OUTPUT carries. The clone is probably incomplete: "
            "restore the files from version control."
        )
    (folder / "serving").mkdir()
    copy_files(folder, present_files(REPOSITORY, (*CODE_FILES, *DOOR_FILES, "LICENSE")))
    if checkpoint.flavour == "instruct":
        copy_files(folder, {"chat_template.jinja": _template(checkpoint, "chat_template.jinja")})
    ids = stop_ids(checkpoint, write_tokenizer(folder, checkpoint))
    text = checkpoint.config["text_config"]
    if not checkpoint.is_ours:
        eos = ids["eos_token_id"]
        text = text | ids | {"eos_token_id": eos[0] if isinstance(eos, list) else eos}
    dtype = views["model.language_model.embed_tokens.weight"].dtype
    config = checkpoint.config | {"dtype": str(dtype).removeprefix("torch.")}
    config["text_config"] = unfused_text_config(text) if text_layout == "unfused" else text
    build_config(config)  # validates
    write_json(folder / "config.json", config)
    generation = read_json(_template(checkpoint, "generation_config.json"))
    write_json(folder / "generation_config.json", generation | ids)
    write_json(folder / "preprocessor_config.json", checkpoint.preprocessor)
    processor = {key: config["resampler_config"][key] for key in ("num_latents", "token_sampling")}
    template = read_json(_template(checkpoint, "processor_config.json"))
    write_json(folder / "processor_config.json", template | processor)
    write_card(folder, MODEL_CARD, checkpoint)
    return config


def _template(checkpoint: Checkpoint, name: str) -> Path:
    own = checkpoint.template_folder / name
    return own if own.is_file() else REPOSITORY / name


def write_card(folder: Path, card: str, checkpoint: Checkpoint) -> None:
    """Write README.md from one of the cards; by its mark a later run knows the folder as an output."""
    write_text(folder / "README.md", card.format(source=checkpoint.description, mark=MARK))


# -- Verifying --------------------------------------------------------------------------------------------------------


def verify_bits(folder: Path, views: Views) -> None:
    """Compare every written tensor, bit for bit, with a fresh read and transform of the source.

    Raises:
        ValueError: on a difference.
    """
    written = views_of(open_reader(folder))
    if set(written) != set(views):
        raise ValueError(
            f"{folder} holds {len(written)} tensors and {len(views)} were planned ({some(set(written) ^ set(views))} "
            "differ). The disk is probably failing: convert again onto another one."
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

    config_class = type(AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True))
    model_config = build_config(config, config_class)
    model_config.auto_map = config["auto_map"]
    model_config._name_or_path = str(REPOSITORY)
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
            f"({len(expected)}): {some(wrong)}. convert_weights.py and modeling_blip3.py are probably of two "
            "versions: update both."
        )
    print(f"verified names and shapes of {len(expected)} tensors against the model")
