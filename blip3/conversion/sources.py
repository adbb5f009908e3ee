# SPDX-License-Identifier: Apache-2.0
"""Every kind of source, read into one form.

In: the command line. Out: a `Checkpoint`, its tensors checked against its config by name and shape.

    from_release      a released folder, or a LAVIS .pt with or without the vision tower
    from_backbones    a vision tower and Phi-3, with newly initialised weights between them
    from_ours         a folder this script wrote, or that `save_pretrained` wrote from one
"""

import argparse
import hashlib
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..refusals import list_names
from .card import card_origin, parts_origin, released_origin
from .configs import (
    RELEASED_TEXT,
    TEMPLATES,
    Checkpoint,
    complete_config,
    join_config,
    optional_json,
    own_preprocessor,
    preprocessor_config_of,
    read_json,
    read_released_config,
    read_sizes,
    released_config,
    template,
    text_config_of,
    tower_statistics,
    vision_config_of,
)
from .names import (
    DEAD_ROWS,
    EMBEDDING,
    FOLDED,
    HEAD_BIAS,
    HEAD_WEIGHT,
    IMAGE_TOKENS,
    KNOWN_RELEASES,
    PREFIXES,
    UNUSED,
    check_shapes,
    expected_shapes,
    to_ours,
    to_released,
)
from .quantized import describe
from .replace import are_weights_as_written
from .tensors import (
    InitialisedReader,
    Reader,
    SafetensorsReader,
    TorchReader,
    Views,
    concat,
    fold,
    fuse_text,
    progress_bar,
    shape_of,
    shapes_of,
    views_of,
)
from .tokenizer_files import TOKENIZER_FILES, count_ids, present_files
from .towers import find_tower, from_open_clip

FILE_NAME = re.compile(r"[^/\\\0]*[^/\\\0.][^/\\\0]*")  # no path, and not only dots
ORIGINAL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model")


# -- Files ------------------------------------------------------------------------------------------------------------


def open_reader(path: Path) -> Reader:
    """Open a weights file, or the weights of a folder (index, single safetensors, or single torch file).

    Raises:
        FileNotFoundError: if there are none, or the index names a shard that is not there.
        ValueError: if a file is damaged, or shards and index disagree.
    """
    if path.is_file():
        return SafetensorsReader([path]) if path.suffix == ".safetensors" else TorchReader(path)
    index_path = path / "model.safetensors.index.json"
    if index_path.is_file():
        return _open_index(index_path)
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model.bin", "*.bin", "*.pt", "*.pth"):
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return open_reader(found[0])
    raise FileNotFoundError(
        f"{path} has no weights: neither model.safetensors.index.json nor exactly one .safetensors, .bin, .pt or .pth "
        "file. The folder was probably downloaded without its large files: download them, or name the file itself."
    )


def _open_index(index_path: Path) -> Reader:
    weight_map = read_json(index_path).get("weight_map", {})
    _check_weight_map(weight_map, index_path)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (index_path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index_path} names {len(shards)} shards and {len(missing)} of them are not there: "
            f"{list_names(missing)}. The download probably stopped early: download the missing files."
        )
    reader = SafetensorsReader([index_path.parent / name for name in shards])
    for what, names in (("lack", set(weight_map) - set(reader.specs)), ("add", set(reader.specs) - set(weight_map))):
        if names:
            raise ValueError(
                f"The shards of {index_path} {what} {len(names)} tensors compared with the index's {len(weight_map)}: "
                f"{list_names(names)}. Shards and index are probably of two revisions: download all of one revision."
            )
    return reader


def _check_weight_map(weight_map: Any, index_path: Path) -> None:
    """Refuse an index that is not names of tensors and of files beside it."""
    names = weight_map.values() if isinstance(weight_map, dict) else [weight_map]
    wrong = [name for name in names if not isinstance(name, str) or not FILE_NAME.fullmatch(name)]
    if wrong or not weight_map:
        raise ValueError(
            f"{index_path} gives {repr(wrong[0])[:80] if wrong else 'no shard'} as the file of a tensor, but "
            "weight_map must name files beside it, one for each tensor. The index was probably edited or damaged: "
            "download it again."
        )


def check_known_release(folder: Path) -> str | None:
    """Compare the shards' sha256 with the table when all names and sizes match a known release.

    Returns:
        The release's name, or None when this is not a known release and nothing was hashed.

    Raises:
        ValueError: on a hash that differs.
    """
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    for release, shards in KNOWN_RELEASES.items():
        if sizes != {name: num_bytes for name, (_, num_bytes) in shards.items()}:
            continue
        with progress_bar(sum(sizes.values()), "sha256") as progress:
            for name, (expected, _) in shards.items():
                _check_hash(folder / name, expected, release, progress)
        print(f"{folder} is {release}: sha256 of {len(shards)} shards as released")
        return release
    print(f"{folder} is not a known release: hashes not checked")
    return None


def _check_hash(path: Path, expected: str, release: str, progress: tqdm) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            progress.update(len(block))
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path} has sha256 {digest.hexdigest()} but {release} was released with {expected}, at the same size. "
            "The file was probably damaged on the way: download it again."
        )


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


# -- A release --------------------------------------------------------------------------------------------------------


def from_release(args: argparse.Namespace) -> Checkpoint:
    """Read a released folder or a LAVIS .pt file.

    Raises:
        FileNotFoundError: if weights or the config are missing.
        ValueError: if anything does not fit together; the message says what.
    """
    path, folder, description = args.source, _folder_of(args.source), str(args.source)
    reader = open_reader(path)
    release = check_known_release(path) if path.is_dir() else None
    views = released_views(reader, description)
    has_tower = any(name.startswith("vision_encoder.") for name in views)
    if not has_tower and args.vision is None:
        raise ValueError(
            f"{description} has {len(views)} tensors and no vision tower, as training under DDP leaves it. The model "
            "needs the tower it was trained with: pass --vision DIR, its folder or a released one."
        )
    if has_tower and args.vision is not None:
        raise ValueError(
            f"{description} has a vision tower of its own and --vision {args.vision} was given too; only one can be "
            "used. --vision is for .pt files without a tower: leave it out."
        )
    if not has_tower:
        views |= find_tower(views_of(open_reader(args.vision)), str(args.vision), _given_vision(args))
    config_path = args.source_config or folder / "config.json"
    source_config = read_released_config(config_path, is_required=path.is_dir() or args.source_config is not None)
    preprocessor = optional_json(folder / "preprocessor_config.json")
    config, variant = released_config(views, source_config, preprocessor, _given_vision(args), args.variant)
    used, unused = fold(views, config["image_token_id"])
    check_shapes(shapes_of(used), config, description)
    _check_big_vocabulary(views, source_config)
    small_files = present_files(folder, ORIGINAL_FILES + TOKENIZER_FILES)
    if args.source_config is not None:
        small_files["config.json"] = args.source_config
    return Checkpoint(
        views=used,
        unused=unused,
        config=config,
        preprocessor=preprocessor_config_of(preprocessor, config),
        generation=optional_json(folder / "generation_config.json") or {},
        variant=variant,
        description=description,
        tokenizer=args.tokenizer or folder,
        small_files=small_files,
        origin=released_origin(path, release, variant),
    )


def released_views(reader: Reader, description: str) -> Views:
    """Return a release's tensors under released names.

    Raises:
        ValueError: if they are another model's; `description` says where they are from.
    """
    views = {name.removeprefix("vlm."): view for name, view in views_of(reader).items()}
    if not any(name.startswith(tuple(prefix for prefix, _ in PREFIXES)) for name in views):
        raise ValueError(
            f"{description} has {len(views)} tensors, none under vlm.*, vision_encoder.*, vision_tokenizer.* or "
            f"lang_model.* ({list_names(views)}). It is probably another model: check the path given."
        )
    return from_open_clip(views)


def _check_big_vocabulary(views: Views, source_config: dict) -> None:
    vocab = source_config.get("text_config", {}).get("vocab_size", RELEASED_TEXT["vocab_size"])
    for name, added in FOLDED.items():
        if views[name].shape[0] != vocab or (added in views and views[added].shape[0] != len(IMAGE_TOKENS)):
            raise ValueError(
                f"{name} has {views[name].shape[0]} rows and {shape_of(views, added)[0]} added ones, but the config "
                f"gives {vocab} and 3. It probably belongs to another checkpoint: pass the right --source-config."
            )


# -- Backbones --------------------------------------------------------------------------------------------------------


def from_backbones(args: argparse.Namespace) -> Checkpoint:
    """Join a vision tower and Phi-3 with a newly initialised resampler: the starting point of pre-training.

    Raises:
        FileNotFoundError: if weights are missing, or the tokenizer is and the text model is not Phi-3-mini.
        ValueError: if anything does not fit together; the message says what.
    """
    description = f"{args.vision} + {args.text}"
    views = find_tower(views_of(open_reader(args.vision)), str(args.vision), _given_vision(args))
    vision = vision_config_of(views, _given_vision(args), None)
    text_config = _folder_of(args.text) / "config.json"
    source_text = read_sizes(text_config) if text_config.is_file() else None
    text = text_config_of(source_text or RELEASED_TEXT, window_shift=1)
    text_views = {
        "lang_model." + name: view
        for name, view in views_of(open_reader(args.text)).items()
        if name.startswith(("model.", "lm_head.")) and "rotary_emb" not in name
    }
    folder = args.tokenizer or _folder_of(args.text)
    num_ids = count_ids(folder, shape_of(text_views, EMBEDDING)[0])
    width = vision["hidden_size"]
    resampler = template()["resampler_config"] | {"hidden_size": width, "intermediate_size": 4 * width}
    variant = "instruct" if args.variant == "auto" else args.variant
    config = join_config(vision, resampler, text, num_ids, None, variant)
    used, unused = _add_initialised(views | text_views, config)
    check_shapes(shapes_of(used), config, description)
    return Checkpoint(
        views=used,
        unused=unused,
        config=config,
        preprocessor=preprocessor_config_of(tower_statistics(_folder_of(args.vision)), config),
        generation=optional_json(folder / "generation_config.json") or {},
        variant=variant,
        description=description,
        tokenizer=folder,
        origin=parts_origin(args.vision, args.text),
    )


def _given_vision(args: argparse.Namespace) -> dict | None:
    """Return the configuration of --vision-config, else that in SOURCE, else --vision's if it is the tower's own."""
    if args.vision_config:
        return read_sizes(args.vision_config)
    for name in ("siglip_vision_config.json", "open_clip_config.json"):
        if args.source and (_folder_of(args.source) / name).is_file():
            return read_sizes(_folder_of(args.source) / name)
    if not args.vision:
        return None
    paths = [_folder_of(args.vision) / name for name in ("open_clip_config.json", "config.json")]
    config = next((read_sizes(path) for path in paths if path.is_file()), {})
    own = ("vision_config", "num_attention_heads", "model_cfg", "vision_cfg", "architecture")
    return config if any(config.get(name) for name in own) else None


def _add_initialised(views: Views, config: dict) -> tuple[Views, Views]:
    """Add newly initialised resampler weights and vocabulary rows; return all views and those never used."""
    initialised, num_ids = InitialisedReader(), config["image_token_id"]
    text, std = config["text_config"], config["resampler_config"]["initializer_range"]
    unused = {name: views.pop(name) for name in list(views) if name.startswith(UNUSED)}
    for name in (EMBEDDING, HEAD_WEIGHT):
        whole = views[name] if name in views else views[EMBEDDING]
        kept = min(num_ids, whole.shape[0])
        shape = (text["vocab_size"] - kept, *whole.shape[1:])
        views[name] = concat(whole.rows(0, kept), initialised.add(name, shape, text["initializer_range"], whole.dtype))
        if whole.shape[0] > kept:
            unused[DEAD_ROWS + name] = whole.rows(kept, whole.shape[0])
    dtype = views[HEAD_WEIGHT].dtype
    views[HEAD_BIAS] = initialised.add(HEAD_BIAS, (text["vocab_size"],), std, dtype)
    for name, shape in expected_shapes(config).items():
        if name.startswith("vision_tokenizer."):
            ours = to_ours(name)  # our names say which tensors are norms
            views[name] = initialised.add(ours, shape, std, dtype)
    return views, unused


# -- Our own ----------------------------------------------------------------------------------------------------------


def from_ours(args: argparse.Namespace) -> Checkpoint:
    """Read a folder this script wrote, or that `save_pretrained` wrote from one.

    Raises:
        FileNotFoundError: if weights are missing.
        ValueError: if tensors and config do not fit, or another variant is asked for.
    """
    folder, base, description = args.source, args.base, str(args.source)
    config, text_layout = complete_config(read_json(folder / "config.json"))
    variant = "instruct" if config["tile_grids"] else "base"
    if args.variant not in ("auto", variant) and not args.to_original:
        raise ValueError(
            f"{description} is of variant {variant} and --variant {args.variant} was given; tokenizers of the two "
            "differ. Convert the original release again with that variant."
        )
    quantization, views = describe(config), {}
    if quantization is None:
        views = fuse_text({to_released(name): view for name, view in views_of(open_reader(folder)).items()})
        check_shapes(shapes_of(views), config, description)
    original, unused, dtype_changed = folder / "original", {}, False
    if (original / "unused.safetensors").is_file():
        reader = SafetensorsReader([original / "unused.safetensors"])
        unused, dtype_changed = views_of(reader), reader.metadata.get("weights_dtype") == "changed"
    folders = (folder, *([base] if base else []))
    has_tokenizer = [path for path in folders if (path / "tokenizer.json").is_file()]
    generation = [path for path in folders if (path / "generation_config.json").is_file()]
    return Checkpoint(
        views=views,
        unused=unused,
        config=config,
        preprocessor=own_preprocessor(folders, config),
        generation=read_json(generation[0] / "generation_config.json") if generation else {},
        variant=variant,
        description=description,
        tokenizer=args.tokenizer or (has_tokenizer or folders)[0],
        small_files=present_files(original, ORIGINAL_FILES + TOKENIZER_FILES),
        is_ours=True,
        dtype_changed=dtype_changed,
        text_layout=text_layout,
        template_folders=(*folders, TEMPLATES),
        quantization=quantization,
        origin=card_origin(folder, base, are_weights_as_written(folder)),
    )
