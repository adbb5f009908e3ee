# SPDX-License-Identifier: Apache-2.0
"""Convert released BLIP-3 / xGen-MM r-v1.5 weights to this repository's names, and back.

    python convert_weights.py RELEASE OUTPUT                     released folder or LAVIS .pt -> our folder
    python convert_weights.py OURS ORIGINAL --to-original        our folder -> released names
    python convert_weights.py --vision SIGLIP --text PHI3 OUTPUT starting point of pre-training

Every conversion is made of row ranges: an output tensor is a list of row ranges (of dimension 0) of source tensors,
one below the other. Folding the added vocabulary rows, splitting fused projections and undoing both are such lists,
so a `View` is planned from headers alone and the data is streamed through `CHUNK_BYTES` of memory when it is written.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent
CODE_FILES = ("configuration_blip3.py", "image_processing_blip3.py", "processing_blip3.py", "modeling_blip3.py")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ORIGINAL_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.model")
CHUNK_BYTES = 32 * 2**20
REMAP_BYTES = 512 * 2**20  # a mapped .pt is mapped anew after this much was read, so that its pages leave memory
SEED = 0
MARK = "Written by `convert_weights.py`"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

# sha256 and bytes of the shards, from the pointer files of the releases.
KNOWN_RELEASES = {
    "xgen-mm-phi3-mini-base-r-v1.5": {
        "model-00001-of-00004.safetensors": (
            "45173ee95995173da1d019e4a66c5506e55f218380e7b8e31c78d53dbe75ced6",
            4962660968,
        ),
        "model-00002-of-00004.safetensors": (
            "ea05c36d3ff8eb154a24673a2ad4a068b0f35ef53df674501a160e5aa680ea73",
            4983112136,
        ),
        "model-00003-of-00004.safetensors": (
            "36b1b5c0001ce8a8bc13930b4d613025ad92a708f126948bff2faecd3acae8da",
            4983112168,
        ),
        "model-00004-of-00004.safetensors": (
            "25c7d1851170158d175cfa105f704daf18dc3f1e2d997a5bc5e8af883b93d2a0",
            2508236156,
        ),
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Names: the only table from the released names (without `vlm.`) to ours
# ---------------------------------------------------------------------------------------------------------------------

PREFIXES = (
    ("vision_encoder.", "model.vision_tower.vision_model."),
    ("vision_tokenizer.", "model.resampler."),
    ("lang_model.model.", "model.language_model."),
    ("lang_model.lm_head.", "lm_head."),
)
RESAMPLER_PARTS = (
    ("0.norm_media.", "patch_norm."),
    ("0.norm_latents.", "latent_norm."),
    ("0.to_q.", "q_proj."),
    ("0.to_kv.", "kv_proj."),
    ("0.to_out.", "o_proj."),
    ("1.0.", "mlp_norm."),
    ("1.1.", "fc1."),
    ("1.3.", "fc2."),
)
TIMM_NAMES = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.proj.", "self_attn.out_proj."),
    ("norm.", "post_layernorm."),
)
EMBEDDING = "lang_model.model.embed_tokens.weight"
HEAD_WEIGHT, HEAD_BIAS = "lang_model.lm_head.weight", "lang_model.lm_head.bias"
FOLDED = {
    EMBEDDING: "lang_model.model.embed_tokens.additional_embedding.weight",
    HEAD_WEIGHT: "lang_model.lm_head.additional_fc.weight",
    HEAD_BIAS: "lang_model.lm_head.additional_fc.bias",
}
DEAD_ROWS = "dead_rows."  # prefix, in original/unused.safetensors, of rows no token id reaches
POOLING_HEAD = "vision_encoder.head."
IMAGE_TOKENS = ("<image>", "<image placeholder>", "<|endofchunk|>")
LLAMA_SPACE = "\u2581"


def to_ours(name: str) -> str:
    """Return our name of a tensor.

    >>> to_ours("vision_tokenizer.layers.2.1.3.weight")
    'model.resampler.layers.2.fc2.weight'
    """
    return _rename(name, PREFIXES, RESAMPLER_PARTS)


def to_released(name: str) -> str:
    """Return the released name, without `vlm.`, of one of our tensors; the 5.x tower layout is accepted too."""
    prefix = "model.vision_tower."
    if name.startswith(prefix) and not name.startswith(prefix + "vision_model."):
        name = prefix + "vision_model." + name[len(prefix) :]
    return _rename(name, [pair[::-1] for pair in PREFIXES], [pair[::-1] for pair in RESAMPLER_PARTS])


def _rename(name: str, prefixes: Any, resampler_parts: Any) -> str:
    for old, new in prefixes:
        if not name.startswith(old):
            continue
        rest = name[len(old) :]
        match = re.fullmatch(r"(layers\.\d+\.)(.+)", rest) if "vision_tokenizer." in (old, new) else None
        for old_part, new_part in resampler_parts if match else ():
            if match[2].startswith(old_part):
                return new + match[1] + new_part + match[2][len(old_part) :]
        return new + rest
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Sources: headers first, rows on demand
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """Where a stored tensor is and what it looks like; `offset` counts bytes from the start of `path`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path | None = None
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Reader(Protocol):
    """Anything with headers (`specs`) and a way to read rows."""

    specs: dict[str, Spec]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of one stored tensor."""

    reader: Reader
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class View:
    """A tensor to be written: parts below each other, in `dtype`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "View":
        parts, position = [], 0
        for part in self.parts:
            length = part.stop - part.start
            low, high = max(start - position, 0), min(stop - position, length)
            if low < high:
                parts.append(replace(part, start=part.start + low, stop=part.start + high))
            position += length
        return View(self.dtype, (stop - start, *self.shape[1:]), tuple(parts))


def views_of(reader: Reader) -> dict[str, View]:
    """Return one view per stored tensor."""
    return {
        name: View(spec.dtype, spec.shape, (Part(reader, name, 0, spec.shape[0]),))
        for name, spec in reader.specs.items()
        if spec.shape
    }


def concat(*views: View) -> View:
    """Put views below each other. Widths must agree; the check against the config comes later and names the tensor."""
    dtype = views[0].dtype
    for view in views[1:]:
        dtype = torch.promote_types(dtype, view.dtype)
    rows = sum(view.shape[0] for view in views)
    return View(dtype, (rows, *views[0].shape[1:]), tuple(part for view in views for part in view.parts))


def chunks(view: View) -> Iterator[np.ndarray]:
    """Yield the bytes of a view, converted to its dtype, at most about `CHUNK_BYTES` of source at a time."""
    for part in view.parts:
        step = max(1, CHUNK_BYTES // max(1, part.reader.specs[part.name].row_bytes))
        for start in range(part.start, part.stop, step):
            tensor = part.reader.read(part.name, start, min(start + step, part.stop))
            converted = tensor.to(view.dtype)
            if view.dtype == torch.float16 and not torch.equal(converted.isfinite(), tensor.isfinite()):
                raise ValueError(
                    f"{part.name} holds values up to {tensor.abs().max().item():g}, but float16 ends at 65504. The "
                    "weights were trained in a dtype with a wider range: use --dtype bfloat16."
                )
            yield converted.contiguous().reshape(-1).view(torch.uint8).numpy()


class SafetensorsReader:
    """Rows of safetensors files by plain reads: a mapping would keep every page it touched in memory."""

    def __init__(self, paths: list[Path]):
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                if length + 8 > size or length > 2**27:
                    raise ValueError(f"header length {length}, file length {size}")
                header = json.loads(file.read(length))
                entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
                specs = {name: self._spec(path, 8 + length, entry) for name, entry in entries.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} has {size} bytes and no readable safetensors header ({error}); expected a header and "
                    "float tensors. The file is probably damaged or of another kind: download it again."
                ) from error
        end = max((spec.offset + math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values()), default=0)
        if end > size:
            raise ValueError(
                f"{path} has {size} bytes but its header describes {end}, so {end - size} are missing. The download "
                "was probably cut off: download the file again."
            )
        self.specs.update(specs)
        self.metadata.update(header.get("__metadata__") or {})

    @staticmethod
    def _spec(path: Path, data_start: int, entry: dict) -> Spec:
        begin, end = entry["data_offsets"]
        spec = Spec(DTYPES[entry["dtype"]], tuple(entry["shape"]), path, data_start + begin)
        if begin < 0 or end - begin != math.prod(spec.shape) * spec.dtype.itemsize:
            raise ValueError(f"{end - begin} bytes for shape {spec.shape} of {spec.dtype}")
        return spec

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.specs[name]
        count = (stop - start) * spec.row_bytes
        data = np.fromfile(spec.path, np.uint8, count, offset=spec.offset + start * spec.row_bytes)
        return torch.from_numpy(data).view(spec.dtype).reshape(stop - start, *spec.shape[1:])


class TorchReader:
    """Rows of a torch.save file, mapped, and mapped anew every `REMAP_BYTES`."""

    def __init__(self, path: Path):
        self.path = path
        self._tensors = self._load()
        self._read_bytes = 0
        self.specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def _load(self) -> dict[str, torch.Tensor]:
        try:
            state = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises many kinds here, all about the file
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"{self.path} ({self.path.stat().st_size} bytes) cannot be read by torch.load ({reason[:200]}); "
                "expected a file of torch.save with tensors only. It is probably cut off or of another kind: copy it "
                "again, or save its state dict anew with torch.save."
            ) from error
        while isinstance(state, dict) and not any(isinstance(value, torch.Tensor) for value in state.values()):
            inner = [state[key] for key in ("model_state_dict", "state_dict", "model") if key in state]
            state = inner[0] if inner else None
        if not isinstance(state, dict):
            raise ValueError(
                f"{self.path} holds no state dict; expected names and tensors, bare or under 'model_state_dict'. It "
                "is probably an optimizer state or a pickled model: save model.state_dict() instead."
            )
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        return {name.removeprefix("module."): value for name, value in tensors.items() if value.is_floating_point()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self._read_bytes > REMAP_BYTES:
            self._tensors.clear()
            self._tensors, self._read_bytes = self._load(), 0
        self._read_bytes += (stop - start) * self.specs[name].row_bytes
        return self._tensors[name][start:stop]


class FreshReader:
    """Untrained weights: linears and latents normal, norms 1 and 0. Each name has its own seed."""

    def __init__(self) -> None:
        self.specs: dict[str, Spec] = {}
        self._std: dict[str, float] = {}

    def add(self, name: str, shape: tuple[int, ...], std: float, dtype: torch.dtype = torch.float32) -> View:
        self.specs[name] = Spec(dtype, shape)
        self._std[name] = std
        return View(dtype, shape, (Part(self, name, 0, shape[0]),))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        spec = self.specs[name]
        if "norm" in name or name.endswith("bias") or not self._std[name]:
            fill = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            return torch.full((stop - start, *spec.shape[1:]), fill, dtype=spec.dtype)
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
        whole = torch.randn(spec.shape, generator=generator) * self._std[name]
        return whole[start:stop].to(spec.dtype)


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
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (index_path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index_path} names {len(shards)} shards and {len(missing)} of them are not there: {_some(missing)}. The "
            "download probably stopped early: download the missing files."
        )
    reader = SafetensorsReader([index_path.parent / name for name in shards])
    for what, names in (("lack", set(weight_map) - set(reader.specs)), ("add", set(reader.specs) - set(weight_map))):
        if names:
            raise ValueError(
                f"The shards of {index_path} {what} {len(names)} tensors compared with the index's {len(weight_map)}: "
                f"{_some(names)}. Shards and index are probably of two revisions: download all of one revision."
            )
    return reader


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
        with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="sha256", file=sys.stderr) as progress:
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


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: what the weights and the small files say, in our words
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A source in one common form: released names without `vlm.`, projections fused, added rows folded in.

    `config` is our config.json with a phi3 text_config; its image_token_id is also the number of original token ids.
    """

    views: dict[str, View]
    unused: dict[str, View]
    config: dict
    preprocessor: dict
    generation: dict
    flavour: str
    description: str
    tokenizer: Path | None = None
    is_ours: bool = False
    dtype_changed: bool = False
    text_layout: str = "phi3"
    small_files: dict[str, Path] = field(default_factory=dict)
    template_folder: Path = REPOSITORY


def read_json(path: Path) -> dict:
    """Read a JSON object, or say which file is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not JSON ({error}); expected an object. It is probably cut off "
            "or a Git LFS pointer: download it again."
        ) from error
    return content


def _optional_json(path: Path | None) -> dict | None:
    return read_json(path) if path is not None and path.is_file() else None


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _shape(views: dict[str, View], name: str) -> tuple[int, ...]:
    if name not in views:
        raise ValueError(
            f"The source has {len(views)} tensors but not {name}, which every BLIP-3 checkpoint holds. It is probably "
            "incomplete or of another model: check the path given."
        )
    return views[name].shape


def _num_layers(views: dict[str, View], prefix: str) -> int:
    found = {int(match[1]) for name in views if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return len(found)


def vision_config_of(views: dict[str, View], given: dict | None, image_size: int | None) -> dict:
    """Infer the tower's sizes from its tensors; heads and image size come from `given`, or are SO400M's."""
    config = dict(read_json(REPOSITORY / "config.json")["vision_config"])
    hidden, _, patch, _ = _shape(views, "vision_encoder.embeddings.patch_embedding.weight")
    given = (given or {}).get("vision_config", given or {})
    config.update({key: value for key, value in given.items() if key in config and key != "model_type"})
    if "num_attention_heads" not in given and hidden != config["hidden_size"]:
        raise ValueError(
            f"The vision tower has width {hidden}, and only width {config['hidden_size']} (SigLIP-SO400M) is known to "
            "have 16 heads; tensors do not tell the number of heads. Pass its SigLIP config.json with --vision-config."
        )
    config |= {
        "hidden_size": hidden,
        "patch_size": patch,
        "num_channels": _shape(views, "vision_encoder.embeddings.patch_embedding.weight")[1],
        "intermediate_size": _shape(views, "vision_encoder.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _num_layers(views, "vision_encoder.encoder.layers."),
        "image_size": given.get("image_size") or image_size or 384,
        "vision_use_head": False,
    }
    positions = _shape(views, "vision_encoder.embeddings.position_embedding.weight")[0]
    if positions != (config["image_size"] // patch) ** 2:
        raise ValueError(
            f"The vision tower has {positions} positions, but an image of {config['image_size']} pixels in patches of "
            f"{patch} has {(config['image_size'] // patch) ** 2}. The image size is probably another one: pass the "
            "tower's config.json with --vision-config."
        )
    return config


def resampler_config_of(views: dict[str, View], source_config: dict) -> dict:
    """Infer the resampler's sizes from its tensors; heads are 96 channels wide in every release."""
    config = dict(read_json(REPOSITORY / "config.json")["resampler_config"])
    inner = _shape(views, "vision_tokenizer.layers.0.0.to_q.weight")[0]
    latents, hidden = _shape(views, "vision_tokenizer.latents")
    sampling = source_config.get("vision_encoder_config", {}).get("anyres_patch_sampling", True)
    return config | {
        "hidden_size": hidden,
        "num_latents": latents,
        "num_hidden_layers": _num_layers(views, "vision_tokenizer.layers."),
        "num_attention_heads": max(1, inner // config["head_dim"]),
        "intermediate_size": _shape(views, "vision_tokenizer.layers.0.1.1.weight")[0],
        "token_sampling": "patch" if sampling else "fixed",
    }


def text_config_of(source: dict, window_shift: int) -> dict:
    """Return our phi3 text_config: the source's values over Phi-3-mini's.

    Args:
        source: a text_config of the release, of Phi-3 or of ours, phi3 or mistral.
        window_shift: 1 for a release, whose window does not count the token itself; 0 for ours, which counts it.
    """
    config = dict(read_json(REPOSITORY / "config.json")["text_config"])
    config["sliding_window"] = None
    config.update({key: source[key] for key in config if key in source and key != "model_type"})
    if "num_attention_heads" in source and source.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = source["num_attention_heads"]
    for key in ("partial_rotary_factor",):
        if source.get(key, 1.0) != 1.0:
            config[key] = source[key]
    rope = source.get("rope_parameters") or {}  # what transformers 5.x writes
    config["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config["sliding_window"] is not None:
        config["sliding_window"] += window_shift
    return config


def unfused_text_config(config: dict) -> dict:
    """Relabel a phi3 text_config as mistral, the same arithmetic with separate projections.

    Raises:
        ValueError: when the phi3 model uses something Mistral has not.
    """
    if config.get("rope_scaling") or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"text_config has rope_scaling {config.get('rope_scaling')!r}, which the mistral architecture does not "
            "compute as phi3 does. Only the 4k text model can be unfused: use --text-layout phi3."
        )
    dropped = ("original_max_position_embeddings", "embd_pdrop", "resid_pdrop")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    kept = {key: value for key, value in config.items() if key not in dropped}
    return kept | {"model_type": "mistral", "head_dim": head_dim}


def tile_grids_of(pixel_grids: list | None, flavour: str, tile_size: int) -> list[list[int]]:
    """Turn the release's grids, (width, height) in pixels, into ours, (rows, columns) in tiles, in the same order."""
    if flavour == "base":
        return []
    if not pixel_grids:
        return read_json(REPOSITORY / "config.json")["tile_grids"]
    for width, height in pixel_grids:
        if width % tile_size or height % tile_size:
            raise ValueError(
                f"The source lists the grid {width} x {height} (width x height, pixels), which is no whole number of "
                f"tiles of {tile_size} pixels. The vision tower's image size is probably another one: correct "
                "image_size in the file given with --vision-config, or size in preprocessor_config.json."
            )
    return [[height // tile_size, width // tile_size] for width, height in pixel_grids]


def expected_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of `Checkpoint.views`, from a config with a phi3 text_config."""
    vision, text = config["vision_config"], config["text_config"]
    width, mlp, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    positions = (vision["image_size"] // patch) ** 2
    shapes = {
        "vision_encoder.embeddings.patch_embedding.weight": (width, vision["num_channels"], patch, patch),
        "vision_encoder.embeddings.patch_embedding.bias": (width,),
        "vision_encoder.embeddings.position_embedding.weight": (positions, width),
    } | _norm("vision_encoder.post_layernorm", width)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"vision_encoder.encoder.layers.{layer}."
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= _norm(prefix + name, width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{prefix}self_attn.{name}.weight": (width, width), f"{prefix}self_attn.{name}.bias": (width,)}
        shapes |= {f"{prefix}mlp.fc1.weight": (mlp, width), f"{prefix}mlp.fc1.bias": (mlp,)}
        shapes |= {f"{prefix}mlp.fc2.weight": (width, mlp), f"{prefix}mlp.fc2.bias": (width,)}
    return shapes | _resampler_shapes(config["resampler_config"], text["hidden_size"]) | _text_shapes(text)


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resampler_shapes(resampler: dict, text_width: int) -> dict[str, tuple[int, ...]]:
    width, mlp = resampler["hidden_size"], resampler["intermediate_size"]
    inner = resampler["num_attention_heads"] * resampler["head_dim"]
    shapes = {
        "vision_tokenizer.latents": (resampler["num_latents"], width),
        "vision_tokenizer.projection.weight": (text_width, width),
        "vision_tokenizer.projection.bias": (text_width,),
    } | _norm("vision_tokenizer.norm", width)
    for layer in range(resampler["num_hidden_layers"]):
        prefix = f"vision_tokenizer.layers.{layer}."
        for name in ("0.norm_media", "0.norm_latents", "1.0"):
            shapes |= _norm(prefix + name, width)
        shapes |= {
            prefix + "0.to_q.weight": (inner, width),
            prefix + "0.to_kv.weight": (2 * inner, width),
            prefix + "0.to_out.weight": (width, inner),
            prefix + "1.1.weight": (mlp, width),
            prefix + "1.3.weight": (width, mlp),
        }
    return shapes


def _text_shapes(text: dict) -> dict[str, tuple[int, ...]]:
    width, mlp, vocab = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    shapes = {EMBEDDING: (vocab, width), HEAD_WEIGHT: (vocab, width), HEAD_BIAS: (vocab,)}
    shapes["lang_model.model.norm.weight"] = (width,)
    query, key = _projection_widths(text)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"lang_model.model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.qkv_proj.weight": (query + 2 * key, width),
            prefix + "self_attn.o_proj.weight": (width, query),
            prefix + "mlp.gate_up_proj.weight": (2 * mlp, width),
            prefix + "mlp.down_proj.weight": (width, mlp),
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
        }
    return shapes


def _projection_widths(text: dict) -> tuple[int, int]:
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    return text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim


def check_shapes(views: dict[str, View], config: dict, description: str) -> None:
    """Compare names and shapes with the config.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape.
    """
    expected = expected_shapes(config)
    missing, unexpected = set(expected) - set(views), set(views) - set(expected)
    if missing or unexpected:
        lists = [f"{len(missing)} are missing: {_some(missing)}"] if missing else []
        lists += [f"{len(unexpected)} are unexpected: {_some(unexpected)}"] if unexpected else []
        raise ValueError(
            f"{description} should hold {len(expected)} tensors (after folding); {'; '.join(lists)}. The file is "
            "probably incomplete or its config belongs to another checkpoint: check both, or pass --source-config."
        )
    wrong = [
        f"{name} is {list(views[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if views[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"{description} has {len(wrong)} tensors of another shape than its config gives: {'; '.join(wrong[:4])}. "
            "The config probably belongs to another checkpoint: pass the right one with --source-config."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Plan: from each kind of source to a Checkpoint, and from a Checkpoint to tensors under output names
# ---------------------------------------------------------------------------------------------------------------------


def refuse_first_family(names: Any, description: str) -> None:
    """Refuse xGen-MM r-v1 checkpoints, which have another architecture."""
    found = [name for name in names if "vision_encoder.conv1." in name or "text_projection." in name]
    if found:
        raise ValueError(
            f"{description} holds {_some(found)}, which r-v1.5 has not: xGen-MM r-v1 has another vision tower (a CLIP "
            "ViT-H of width 1280). It is probably an r-v1 checkpoint: convert one of the r-v1.5 releases."
        )


def fold(views: dict[str, View], num_ids: int) -> tuple[dict[str, View], dict[str, View]]:
    """Fold the added rows in and set aside what the model never uses.

    Args:
        views: released names without `vlm.`.
        num_ids: number of token ids before the added ones; rows from there on are dead.

    Returns:
        views under the same names without the additional tensors, and the unused ones.
    """
    used = {name: view for name, view in views.items() if not name.startswith(POOLING_HEAD)}
    unused = {name: view for name, view in views.items() if name.startswith(POOLING_HEAD)}
    for name, added in FOLDED.items():
        if name not in used or added not in used:
            continue  # check_shapes names the missing one
        whole = used[name]
        if whole.shape[0] < num_ids:
            raise ValueError(
                f"{name} has {whole.shape[0]} rows but the tokenizer has {num_ids} ids before the added ones. "
                "initial_tokenizer_len probably belongs to another checkpoint: pass the right --source-config."
            )
        used[name] = concat(whole.rows(0, num_ids), used.pop(added))
        if whole.shape[0] > num_ids:
            unused[DEAD_ROWS + name] = whole.rows(num_ids, whole.shape[0])
    return used, unused


def unfold(checkpoint: Checkpoint, num_dead_rows: int) -> tuple[dict[str, View], list[str]]:
    """Undo `fold`, with zeros for dead rows that were not kept.

    Returns:
        views under released names without `vlm.`, and the names of what could not be restored.
    """
    views, lost, num_ids = dict(checkpoint.views), [], checkpoint.config["image_token_id"]
    zeros = FreshReader()
    for name, added in FOLDED.items():
        whole = views[name]
        dead = checkpoint.unused.get(DEAD_ROWS + name)
        if dead is None and num_dead_rows:
            dead = zeros.add(name, (num_dead_rows, *whole.shape[1:]), std=0.0, dtype=whole.dtype)
            lost.append(f"{name} rows {num_ids} to {num_ids + num_dead_rows - 1} (zeros)")
        live, rows = whole.rows(0, num_ids), whole.shape[0]
        views[name] = replace(concat(live, dead), dtype=whole.dtype) if dead else live
        views[added] = whole.rows(num_ids, rows)
    head = {name: view for name, view in checkpoint.unused.items() if name.startswith(POOLING_HEAD)}
    if checkpoint.dtype_changed:
        dtype = views["vision_encoder.post_layernorm.weight"].dtype
        head = {name: replace(view, dtype=dtype) for name, view in head.items()}
    return views | head, lost if head else [*lost, POOLING_HEAD + "* (omitted)"]


def split_text(views: dict[str, View], text: dict) -> dict[str, View]:
    """Split fused text projections: qkv_proj into q, k, v and gate_up_proj into gate and up."""
    query, key = _projection_widths(text)
    mlp, result = text["intermediate_size"], {}
    for name, view in views.items():
        if name.startswith("lang_model.") and "qkv_proj." in name:
            bounds = {"q_proj": (0, query), "k_proj": (query, query + key), "v_proj": (query + key, query + 2 * key)}
            result |= {name.replace("qkv_proj", new): view.rows(*rows) for new, rows in bounds.items()}
        elif name.startswith("lang_model.") and "gate_up_proj." in name:
            bounds = {"gate_proj": (0, mlp), "up_proj": (mlp, 2 * mlp)}
            result |= {name.replace("gate_up_proj", new): view.rows(*rows) for new, rows in bounds.items()}
        else:
            result[name] = view
    return result


def fuse_text(views: dict[str, View]) -> dict[str, View]:
    """Undo `split_text`; does nothing to a fused model."""
    result = dict(views)
    for fused, names in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        for first in [name for name in result if name.startswith("lang_model.") and f".{names[0]}." in name]:
            parts = [first.replace(names[0], name) for name in names]
            if all(part in result for part in parts):
                result[first.replace(names[0], fused)] = concat(*(result.pop(part) for part in parts))
    return result


def vision_views(reader: Reader, description: str) -> dict[str, View]:
    """Find a SigLIP tower under any of its namings; text tower and timm's pooling head are left out."""
    views = views_of(reader)
    kept = ("embeddings.", "encoder.", "post_layernorm.", "head.")
    prefixes = ("vlm.vision_encoder.", "vision_encoder.", PREFIXES[0][1], "model.vision_tower.", "vision_model.", "")
    for prefix in prefixes:
        if prefix + "embeddings.patch_embedding.weight" in views:
            names = {name: name[len(prefix) :] for name in views if name.startswith(prefix)}
            names = {old: new for old, new in names.items() if new.startswith(kept) and "position_ids" not in new}
            return {"vision_encoder." + new: views[old] for old, new in names.items()}
    for prefix in ("visual.trunk.", "trunk.", ""):
        if prefix + "patch_embed.proj.weight" in views:
            names = {name: name[len(prefix) :] for name in views if name.startswith(prefix)}
            return _from_timm({new: views[old] for old, new in names.items() if not new.startswith("attn_pool.")})
    refuse_first_family(views, description)
    raise ValueError(
        f"{description} has {len(views)} tensors and none is a SigLIP patch embedding, in transformers' naming "
        "(embeddings.patch_embedding) or timm's (patch_embed.proj). It is probably another model: pass SigLIP."
    )


def _from_timm(views: dict[str, View]) -> dict[str, View]:
    result = {}
    for name, view in views.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        prefix, rest = (f"encoder.layers.{block[1]}.", block[2]) if block else ("", name)
        if rest.startswith("attn.qkv."):
            width = view.shape[0] // 3
            for index, letter in enumerate("qkv"):
                new = f"self_attn.{letter}_proj." + rest.removeprefix("attn.qkv.")
                result["vision_encoder." + prefix + new] = view.rows(index * width, (index + 1) * width)
            continue
        if rest == "pos_embed":  # (1, positions, width) in timm
            rest, view = "embeddings.position_embedding.weight", replace(view, shape=view.shape[-2:])
        for old, new in TIMM_NAMES:
            if rest.startswith(old):
                rest = new + rest[len(old) :]
                break
        if block or rest.startswith(("embeddings.", "post_layernorm.")):
            result["vision_encoder." + prefix + rest] = view
    return result


def _released_views(reader: Reader, description: str) -> dict[str, View]:
    refuse_first_family(reader.specs, description)
    views = {name.removeprefix("vlm."): view for name, view in views_of(reader).items()}
    known = [name for name in views if name.startswith(tuple(prefix for prefix, _ in PREFIXES))]
    if not known:
        raise ValueError(
            f"{description} has {len(views)} tensors, none under vlm.*, vision_encoder.*, vision_tokenizer.* or "
            f"lang_model.* ({_some(views)}). It is probably another model: check the path given."
        )
    return views


def from_release(args: argparse.Namespace) -> Checkpoint:
    """Read a released folder or a LAVIS .pt file."""
    path, description = args.source, str(args.source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        reader = open_reader(path)
        check_known_release(path)
    else:
        reader = open_reader(path)
    views = _released_views(reader, description)
    has_tower = any(name.startswith("vision_encoder.") for name in views)
    if not has_tower and args.vision is None:
        raise ValueError(
            f"{description} has {len(views)} tensors and no vision tower, as training under DDP leaves it. The model "
            "needs the tower it was trained with: pass --vision DIR, a SigLIP folder or a released folder."
        )
    if has_tower and args.vision is not None:
        raise ValueError(
            f"{description} has a vision tower of its own and --vision {args.vision} was given too; only one can be "
            "used. --vision is for .pt files without a tower: leave it out."
        )
    given_vision = read_json(args.vision_config) if args.vision_config else None
    if not has_tower:
        views |= vision_views(open_reader(args.vision), str(args.vision))
        given_vision = given_vision or _siglip_config(args.vision)
    config_path = args.source_config or folder / "config.json"
    source_config = _source_config(config_path, is_given=args.source_config is not None, is_folder=path.is_dir())
    preprocessor = _optional_json(folder / "preprocessor_config.json")
    config, flavour = _released_config(views, source_config, preprocessor, given_vision, args.flavour)
    used, unused = fold(views, config["image_token_id"])
    check_shapes(used, config, description)
    _check_big_vocabulary(views, source_config)
    files = {name: folder / name for name in ORIGINAL_FILES + TOKENIZER_FILES if (folder / name).is_file()}
    if args.source_config is not None:
        files["config.json"] = args.source_config
    return Checkpoint(
        used, unused, config, _preprocessor(preprocessor, config),
        _optional_json(folder / "generation_config.json") or {}, flavour, description,
        tokenizer=args.tokenizer or folder, small_files=files,
    )  # fmt: skip


def _source_config(path: Path, is_given: bool, is_folder: bool) -> dict:
    if not path.is_file() and (is_given or is_folder):
        raise FileNotFoundError(
            f"{path} does not exist; expected the release's config.json, which gives initial_tokenizer_len. It was "
            "probably not downloaded: add it, or pass --source-config FILE."
        )
    config = _optional_json(path) or {}
    text = config.get("text_config", {})
    if config and (config.get("model_type") != "xgenmm" or text.get("model_type", "phi3") != "phi3"):
        raise ValueError(
            f"{path} has model_type {config.get('model_type')!r} with text model {text.get('model_type')!r}; expected "
            "'xgenmm' with 'phi3'. It probably belongs to another model: pass the right one with --source-config."
        )
    return config


def _check_big_vocabulary(views: dict[str, View], source_config: dict) -> None:
    vocab = source_config.get("text_config", {}).get("vocab_size", 32064)
    for name, added in FOLDED.items():
        if views[name].shape[0] != vocab or (added in views and views[added].shape[0] != len(IMAGE_TOKENS)):
            raise ValueError(
                f"{name} has {views[name].shape[0]} rows and {_shape(views, added)[0]} added ones, but the config "
                f"gives {vocab} and 3. It probably belongs to another checkpoint: pass the right --source-config."
            )


def _released_config(
    views: dict[str, View], source: dict, preprocessor: dict | None, given_vision: dict | None, flavour: str
) -> tuple[dict, str]:
    """Return our config with a phi3 text_config, and the flavour."""
    size = (preprocessor or {}).get("size")
    image_size = size[0] if isinstance(size, list) else (size or {}).get("height") if isinstance(size, dict) else size
    vision = vision_config_of(views, given_vision, image_size)
    text = text_config_of(source.get("text_config", {"sliding_window": 2047}), window_shift=1)
    num_ids = source.get("text_config", {}).get("initial_tokenizer_len", 32012)
    if not source and _shape(views, "lang_model.model.norm.weight")[0] != text["hidden_size"]:
        raise ValueError(
            f"The text model has width {_shape(views, 'lang_model.model.norm.weight')[0]} and no config.json beside "
            f"it, so Phi-3-mini's width {text['hidden_size']} was expected. It is probably another size: pass the "
            "checkpoint's original config.json with --source-config."
        )
    text["vocab_size"] = num_ids + len(IMAGE_TOKENS)
    grids = (preprocessor or {}).get("grids") or source.get("vision_encoder_config", {}).get("anyres_grids")
    if flavour == "auto":
        flavour = "base" if preprocessor is not None and preprocessor.get("grids") is None else "instruct"
    config = read_json(REPOSITORY / "config.json") | {
        "image_token_id": num_ids,
        "tile_grids": tile_grids_of(grids, flavour, vision["image_size"]),
        "vision_config": vision,
        "resampler_config": resampler_config_of(views, source),
        "text_config": text,
    }
    return config, flavour


def _preprocessor(source: dict | None, config: dict) -> dict:
    """Fill the template with the source's mean and standard deviation and the config's sizes."""
    template = read_json(REPOSITORY / "preprocessor_config.json")
    side = config["vision_config"]["image_size"]
    values = {key: source[key] for key in ("image_mean", "image_std") if source and key in source}
    return template | values | {"size": {"height": side, "width": side}, "tile_grids": config["tile_grids"]}


def _siglip_config(path: Path) -> dict | None:
    folder = path if path.is_dir() else path.parent
    config = _optional_json(folder / "config.json")
    is_known = config and (config.get("vision_config") or "num_attention_heads" in config)
    return config if is_known else None


def from_backbones(args: argparse.Namespace) -> Checkpoint:
    """Join SigLIP and Phi-3 with a fresh resampler: the starting point of pre-training."""
    description = f"{args.vision} + {args.text}"
    views = vision_views(open_reader(args.vision), str(args.vision))
    given_vision = read_json(args.vision_config) if args.vision_config else _siglip_config(args.vision)
    vision = vision_config_of(views, given_vision, None)
    source_text = _optional_json(args.text / "config.json" if args.text.is_dir() else args.text.parent / "config.json")
    text = text_config_of(source_text or {"sliding_window": 2047}, window_shift=1)
    text_views = {
        "lang_model." + name: view
        for name, view in views_of(open_reader(args.text)).items()
        if name.startswith(("model.", "lm_head.")) and "rotary_emb" not in name
    }
    folder = args.tokenizer or (args.text if args.text.is_dir() else args.text.parent)
    num_ids = _count_ids(folder, _shape(text_views, EMBEDDING)[0])
    text["vocab_size"] = num_ids + len(IMAGE_TOKENS)
    template = read_json(REPOSITORY / "config.json")
    resampler = template["resampler_config"] | {"hidden_size": vision["hidden_size"]}
    resampler["intermediate_size"] = 4 * vision["hidden_size"]
    flavour = "instruct" if args.flavour == "auto" else args.flavour
    config = template | {"image_token_id": num_ids, "vision_config": vision, "resampler_config": resampler}
    config |= {"text_config": text, "tile_grids": tile_grids_of(None, flavour, vision["image_size"])}
    used, unused = _join(views | text_views, config)
    check_shapes(used, config, description)
    preprocessor = _preprocessor(_optional_json(args.vision / "preprocessor_config.json"), config)
    return Checkpoint(
        used, unused, config, preprocessor, _optional_json(folder / "generation_config.json") or {}, flavour,
        description, tokenizer=folder,
    )  # fmt: skip


def _join(views: dict[str, View], config: dict) -> tuple[dict[str, View], dict[str, View]]:
    """Add fresh resampler weights and vocabulary rows."""
    fresh, num_ids = FreshReader(), config["image_token_id"]
    text, std = config["text_config"], config["resampler_config"]["initializer_range"]
    unused = {name: views.pop(name) for name in list(views) if name.startswith(POOLING_HEAD)}
    for name in (EMBEDDING, HEAD_WEIGHT):
        whole = views[name] if name in views else views[EMBEDDING]
        kept = min(num_ids, whole.shape[0])
        shape = (text["vocab_size"] - kept, *whole.shape[1:])
        views[name] = concat(whole.rows(0, kept), fresh.add(name, shape, text["initializer_range"], whole.dtype))
        if whole.shape[0] > kept:
            unused[DEAD_ROWS + name] = whole.rows(kept, whole.shape[0])
    dtype = views[HEAD_WEIGHT].dtype
    views[HEAD_BIAS] = fresh.add(HEAD_BIAS, (text["vocab_size"],), std, dtype)
    for name, shape in expected_shapes(config).items():
        if name.startswith("vision_tokenizer."):
            ours = to_ours(name)  # our names say which tensors are norms
            views[name] = fresh.add(ours, shape, std, dtype)
    return views, unused


def _count_ids(folder: Path, num_rows: int) -> int:
    """Return the number of ids of the text tokenizer, with `<pad>`."""
    tokenizer = _optional_json(folder / "tokenizer.json")
    if tokenizer is None and num_rows == 32064:
        return 32012  # Phi-3-mini: 32011 ids and <pad>
    if tokenizer is None:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json and the text model has {num_rows} embedding rows, not Phi-3-mini's "
            "32064, so the number of token ids is unknown. Pass the folder of its tokenizer with --tokenizer DIR."
        )
    return max(_token_ids(tokenizer).values()) + 1 + ("<pad>" not in _token_ids(tokenizer))


def from_ours(args: argparse.Namespace) -> Checkpoint:
    """Read a folder this script wrote, or that `save_pretrained` wrote from one."""
    config, description = read_json(args.source / "config.json"), str(args.source)
    built = build_config(config)  # 4.57 leaves values out of config.json that equal the class's defaults
    config["text_config"] = text_config_of(built.text_config.to_dict() | config["text_config"], window_shift=0)
    for name, sub_config in (("vision_config", built.vision_config), ("resampler_config", built.resampler_config)):
        template = read_json(REPOSITORY / "config.json")[name]
        values = {key: value for key, value in sub_config.to_dict().items() if key in template}
        config[name] = values | config[name] | {"model_type": template["model_type"]}
    config["tile_grids"], config["image_token_id"] = built.tile_grids, built.image_token_id
    layout = "unfused" if built.text_config.model_type == "mistral" else "phi3"
    current = "instruct" if config["tile_grids"] else "base"
    if args.flavour not in ("auto", current) and not args.to_original:
        raise ValueError(
            f"{description} is of flavour {current} and --flavour {args.flavour} was given; tokenizers of the two "
            "differ. Convert the original release again with that flavour."
        )
    views = fuse_text({to_released(name): view for name, view in views_of(open_reader(args.source)).items()})
    check_shapes(views, config, description)
    original, unused, changed = args.source / "original", {}, False
    if (original / "unused.safetensors").is_file():
        reader = SafetensorsReader([original / "unused.safetensors"])
        unused, changed = views_of(reader), reader.metadata.get("weights_dtype") == "changed"
    folder = args.tokenizer or args.source
    names = ORIGINAL_FILES + TOKENIZER_FILES
    return Checkpoint(
        views, unused, config, _optional_json(args.source / "preprocessor_config.json") or _preprocessor(None, config),
        _optional_json(args.source / "generation_config.json") or {}, current, description, tokenizer=folder,
        is_ours=True, dtype_changed=changed, template_folder=args.source, text_layout=layout,
        small_files={name: original / name for name in names if (original / name).is_file()},
    )  # fmt: skip


def plan_ours(checkpoint: Checkpoint, text_layout: str) -> dict[str, View]:
    """Return the tensors of our folder by name, in the requested text layout."""
    views = checkpoint.views
    if text_layout == "unfused":
        views = split_text(views, checkpoint.config["text_config"])
    return {to_ours(name): view for name, view in views.items()}


def cast(views: dict[str, View], dtype: torch.dtype | None) -> dict[str, View]:
    """Give every view a dtype; None keeps each one's own."""
    return views if dtype is None else {name: replace(view, dtype=dtype) for name, view in views.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    """Write an indented JSON file and flush it to disk."""
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_safetensors(path: Path, views: dict[str, View], progress: tqdm, **metadata: str) -> None:
    """Stream views into one safetensors file: header length (8 bytes, little endian), JSON header, data."""
    header, offset = {"__metadata__": {"format": "pt", **metadata}}, 0
    names = sorted(views, key=lambda name: (-views[name].dtype.itemsize, name))  # wide dtypes first keeps alignment
    for name in names:
        view = views[name]
        ends = [offset, offset + view.num_bytes]
        header[name] = {"dtype": DTYPE_CODES[view.dtype], "shape": list(view.shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for chunk in chunks(views[name]):
                file.write(chunk)
                progress.update(chunk.nbytes)
        file.flush()
        os.fsync(file.fileno())
        if file.tell() != 8 + len(text) + offset:
            raise RuntimeError(f"{path}: wrote {file.tell()} bytes instead of {8 + len(text) + offset}")


def group_shards(views: dict[str, View], max_bytes: int) -> list[dict[str, View]]:
    """Cut the plan, in its order, into shards of at most `max_bytes` (a larger tensor gets its own)."""
    shards, size = [{}], 0
    for name, view in views.items():
        if shards[-1] and size + view.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = view
        size += view.num_bytes
    return shards


def write_shards(folder: Path, views: dict[str, View], max_bytes: int, progress: tqdm) -> None:
    """Write model.safetensors, or numbered shards with their index."""
    shards = group_shards(views, max_bytes)
    if len(shards) == 1:
        return write_safetensors(folder / "model.safetensors", views, progress)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, progress)
        weight_map |= dict.fromkeys(shard, name)
    total = {"total_size": sum(view.num_bytes for view in views.values())}
    return write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def is_our_output(folder: Path) -> bool:
    """Tell whether a folder may be replaced: written by this script, and no working tree."""
    config, card = _optional_json(folder / "config.json"), folder / "README.md"
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


def _siblings(output: Path) -> tuple[Path, Path]:
    output = output.absolute()
    return output.with_name(f".{output.name}.partial"), output.with_name(f".{output.name}.old")


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


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def check_space(output: Path, num_bytes: int) -> None:
    """Refuse to start what cannot end for lack of disk."""
    parent = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"OUTPUT needs {num_bytes / 2**30:.1f} GiB and {parent} has {free / 2**30:.1f} GiB free. An earlier "
            "output is only removed after the new one is complete: free some space or choose another disk."
        )


def verify_bits(folder: Path, views: dict[str, View]) -> None:
    """Compare every written tensor, bit for bit, with a fresh read and transform of the source.

    Raises:
        ValueError: on a difference.
    """
    written = views_of(open_reader(folder))
    if set(written) != set(views):
        raise ValueError(
            f"{folder} holds {len(written)} tensors and {len(views)} were planned ({_some(set(written) ^ set(views))} "
            "differ). The disk is probably failing: convert again onto another one."
        )
    total = sum(view.num_bytes for view in views.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", file=sys.stderr) as progress:
        for name, view in views.items():
            same_header = (written[name].dtype, written[name].shape) == (view.dtype, view.shape)
            if not same_header or _digest(written[name], None) != _digest(view, progress):
                raise ValueError(
                    f"{name} read back from {folder} differs from the source after the transform. The source changed "
                    "meanwhile or the disk is failing: convert again."
                )
    print(f"verified {len(views)} tensors bit for bit")


def _digest(view: View, progress: tqdm | None) -> bytes:
    digest = hashlib.blake2b()
    for chunk in chunks(view):
        digest.update(chunk)
        if progress is not None:
            progress.update(chunk.nbytes)
    return digest.digest()


def load_config_class() -> type:
    """Import Blip3Config from the file beside this one."""
    spec = importlib.util.spec_from_file_location("blip3_configuration", REPOSITORY / "configuration_blip3.py")
    module = sys.modules.get(spec.name)
    if module is None:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[spec.name] = module
    return module.Blip3Config


def build_config(config: dict, config_class: type | None = None) -> Any:
    """Build, and so validate, the configuration object of a config.json."""
    ignored = ("dtype", "auto_map", "transformers_version")
    return (config_class or load_config_class()).from_dict({k: v for k, v in config.items() if k not in ignored})


def model_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Build the model of a config without memory and return its tensors' names (4.57 layout) and shapes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config_class = type(AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True))
    model_config = build_config(config, config_class)
    model_config.auto_map = config["auto_map"]
    model_config._name_or_path = str(REPOSITORY)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config, trust_remote_code=True)
    return {to_ours(to_released(name)): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def verify_model(config: dict, views: dict[str, View]) -> None:
    """Compare names and shapes with the model itself.

    Raises:
        ValueError: on a difference.
    """
    shapes = model_shapes(config)
    wrong = [name for name in set(shapes) | set(views) if name not in views or shapes.get(name) != views[name].shape]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors differ between the plan ({len(views)}) and the model of the written config "
            f"({len(shapes)}): {_some(wrong)}. convert_weights.py and modeling_blip3.py are probably of two versions: "
            "update both."
        )
    print(f"verified names and shapes of {len(shapes)} tensors against the model")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and small files
# ---------------------------------------------------------------------------------------------------------------------


def _token_ids(tokenizer: dict) -> dict[str, int]:
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return dict(tokenizer["model"]["vocab"]) | added


def _added_token(content: str, token_id: int) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content} | flags


def build_tokenizer(tokenizer: dict, settings: dict, num_ids: int, flavour: str) -> tuple[dict, dict]:
    """Return tokenizer.json and tokenizer_config.json of the output.

    `base` keeps the released pipeline, the "fast" tokenizer of the reference. `instruct` equals the "slow" tokenizer
    (legacy=False) that supervised training and its prompts used; see `_slow_pipeline`.

    Args:
        tokenizer: the source's tokenizer.json.
        settings: the source's tokenizer_config.json.
        num_ids: number of ids before the added ones; `<image>` gets this id.
        flavour: `instruct` or `base`.

    Raises:
        ValueError: if the tokenizer has another number of ids.
    """
    tokenizer = json.loads(json.dumps(tokenizer))
    ids = _token_ids(tokenizer)
    if "<pad>" not in ids:
        ids["<pad>"] = max(ids.values()) + 1
        tokenizer["added_tokens"].append(_added_token("<pad>", ids["<pad>"]))
    present = [token for token in IMAGE_TOKENS if token in ids]
    if max(token_id for token, token_id in ids.items() if token not in IMAGE_TOKENS) + 1 != num_ids or present:
        raise ValueError(
            f"The tokenizer has {len(ids)} tokens up to id {max(ids.values())}{' with ' if present else ''}"
            f"{_some(present)}, but the checkpoint has {num_ids} ids before <image>. It probably belongs to another "
            "model: pass the right one with --tokenizer DIR."
        )
    tokenizer["added_tokens"] += [_added_token(token, num_ids + index) for index, token in enumerate(IMAGE_TOKENS)]
    special = {}
    for role, default in (("bos", "<s>"), ("eos", "<|endoftext|>"), ("pad", "<pad>"), ("unk", "<unk>")):
        token = default if role == "pad" else settings.get(f"{role}_token") or default  # Phi-3 itself pads with eos
        token = token["content"] if isinstance(token, dict) else token
        special |= {f"{role}_token": token} if token in ids else {}
    if flavour == "instruct":
        _slow_pipeline(tokenizer, {*special.values(), *IMAGE_TOKENS})
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **special,
        "model_max_length": settings.get("model_max_length", 4096),
        "extra_special_tokens": {"image_token": "<image>"},
    }
    return tokenizer, written


def _slow_pipeline(tokenizer: dict, without_space: set[str]) -> None:
    r"""Rewrite a Llama-style tokenizer.json, in place, to give the ids of the slow tokenizer with legacy=False.

    That one puts one dummy space before the text, then cuts at added tokens, so no later segment gets one; it
    drops the dummy again when a special token follows, but not for the phi-3 markers. Here every added token is
    matched after normalization, so that the normalizer sees the whole text, where `\A` inserts the space. Spaces
    become the metasymbol only in the pre-tokenizer, after the markers have stripped the white space behind them.

    Two known differences. A text that is exactly one marker (or `</s>`) gets no dummy space: tokenizers normalizes
    the contents of added tokens too, with the same expression. The control characters U+001C to U+001F count as white
    space after a marker in Python's strip, and not here.
    """
    if tokenizer["model"].get("type") != "BPE" or LLAMA_SPACE not in tokenizer["model"]["vocab"]:
        print("warning: the tokenizer is not of the Llama kind; its pipeline is kept as it is", file=sys.stderr)
        return
    for token in tokenizer["added_tokens"]:
        token["normalized"] = True
    dropped = "|".join(re.escape(token) for token in sorted(without_space))
    every = "|".join(re.escape(token["content"]) for token in tokenizer["added_tokens"])
    tokenizer["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": LLAMA_SPACE}, "content": " "},
            {"type": "Replace", "pattern": {"Regex": rf"\A(?!\z|{dropped}|(?:{every})\z)"}, "content": LLAMA_SPACE},
        ],
    }
    metaspace = {"type": "Metaspace", "replacement": LLAMA_SPACE, "prepend_scheme": "never", "split": False}
    tokenizer["pre_tokenizer"] = metaspace
    first, second = ({"Sequence": {"id": letter, "type_id": index}} for index, letter in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    tokenizer["post_processor"] = template


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> dict[str, int]:
    """Write the tokenizer files and return its ids; warn and return nothing when the source has none."""
    source = checkpoint.tokenizer
    tokenizer = _optional_json(source / "tokenizer.json")
    if checkpoint.is_ours and tokenizer is not None and "<image>" in _token_ids(tokenizer):
        copy_files(folder, {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()})
        return {}
    if tokenizer is None:
        print(
            f"warning: {source} has no tokenizer.json, so OUTPUT lacks tokenizer.json and tokenizer_config.json; pass "
            "--tokenizer DIR to add them",
            file=sys.stderr,
        )
        return {}
    settings = _optional_json(source / "tokenizer_config.json") or {}
    num_ids = checkpoint.config["image_token_id"]
    tokenizer, settings = build_tokenizer(tokenizer, settings, num_ids, checkpoint.flavour)
    _write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
    write_json(folder / "tokenizer_config.json", settings)
    return _token_ids(tokenizer)


def stop_ids(checkpoint: Checkpoint, ids: dict[str, int]) -> dict:
    """Return bos, eos and pad ids: of the tokenizer written, else of the source's files."""
    text, generation = checkpoint.config["text_config"], checkpoint.generation
    stops = ["<|end|>", "<|endoftext|>"] if checkpoint.flavour == "instruct" else ["<|endoftext|>"]
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {key: generation[key] if key in generation else text[key] for key in keys}
    eos = [ids[token] for token in stops if token in ids]
    if eos:
        found["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    found["pad_token_id"] = ids.get("<pad>", found["pad_token_id"])
    found["bos_token_id"] = ids.get("<s>", found["bos_token_id"])
    return found


def copy_files(folder: Path, files: dict[str, Path]) -> None:
    """Copy small files under the given names."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)


def _template(checkpoint: Checkpoint, name: str) -> Path:
    own = checkpoint.template_folder / name
    return own if own.is_file() else REPOSITORY / name


def write_small_files(folder: Path, checkpoint: Checkpoint, text_layout: str, views: dict[str, View]) -> dict:
    """Write code, configs, tokenizer and card; return the written config."""
    missing = [name for name in CODE_FILES if not (REPOSITORY / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{REPOSITORY} lacks {_some(missing)}, which every OUTPUT carries. The clone is probably incomplete: "
            "restore the files from version control."
        )
    copy_files(folder, {name: REPOSITORY / name for name in (*CODE_FILES, "LICENSE") if (REPOSITORY / name).is_file()})
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
    resampler = config["resampler_config"]
    processor = {key: resampler[key] for key in ("num_latents", "token_sampling")}
    template = read_json(_template(checkpoint, "processor_config.json"))
    write_json(folder / "processor_config.json", template | processor)
    _write_text(folder / "README.md", MODEL_CARD.format(source=checkpoint.description, mark=MARK))
    return config


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


def original_configs(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[dict[str, dict], int]:
    """Return config, generation_config and preprocessor_config in the released form, and the number of dead rows."""
    ours, num_ids = checkpoint.config, checkpoint.config["image_token_id"]
    kept = {name: read_json(path) for name, path in checkpoint.small_files.items() if path.suffix == ".json"}
    config = kept.get("config.json") or _rebuilt_config(checkpoint)
    vocab = config["text_config"].get("vocab_size", 32064)
    dead = checkpoint.unused.get(DEAD_ROWS + EMBEDDING)
    if dead is not None and num_ids + dead.shape[0] != vocab:
        config["text_config"]["vocab_size"] = vocab = num_ids + dead.shape[0]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    eos = checkpoint.generation.get("eos_token_id", ours["text_config"]["eos_token_id"])
    generation = {"_from_model_config": True, **checkpoint.generation}
    generation["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
    side = ours["vision_config"]["image_size"]
    preprocessor = {
        "auto_map": {"AutoImageProcessor": "image_processing_blip_3.Blip3ImageProcessor"},
        "do_resize": True,
        "grids": [[columns * side, rows * side] for rows, columns in ours["tile_grids"]] or None,
        "image_mean": checkpoint.preprocessor["image_mean"],
        "image_processor_type": "Blip3ImageProcessor",
        "image_std": checkpoint.preprocessor["image_std"],
        "interpolation_mode": "bicubic",
        "resize_mode": "squash",
        "size": [side, side],
    }
    files = {
        "config.json": config,
        "generation_config.json": kept.get("generation_config.json", generation),
        "preprocessor_config.json": kept.get("preprocessor_config.json", preprocessor),
    }
    return files, vocab - num_ids


def _rebuilt_config(checkpoint: Checkpoint) -> dict:
    ours, num_ids = checkpoint.config, checkpoint.config["image_token_id"]
    text, resampler, side = dict(ours["text_config"]), ours["resampler_config"], ours["vision_config"]["image_size"]
    text |= {"initial_tokenizer_len": num_ids, "vocab_size": 32064 if num_ids == 32012 else -(-num_ids // 64) * 64}
    if text["sliding_window"] is not None:
        text["sliding_window"] -= 1
    vision = {"model_type": "xgenmm_vision_encoder", "image_aspect_ratio": "anyres"}
    vision["anyres_patch_sampling"] = resampler["token_sampling"] == "patch"
    if ours["tile_grids"]:
        vision["anyres_grids"] = [[columns * side, rows * side] for rows, columns in ours["tile_grids"]]
    code = "modeling_xgenmm.XGenMM"
    return {
        "architectures": ["XGenMMModelForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{code}Config",
            "AutoModelForVision2Seq": f"{code}ModelForConditionalGeneration",
        },
        "model_type": "xgenmm",
        "text_config": text,
        "vision_encoder_config": vision,
        "vision_tokenizer_config": {
            "model_type": "xgenmm_vision_tokenizer",
            "vis_feature_dim": resampler["hidden_size"],
            "lang_embedding_dim": text["hidden_size"],
            "num_vis_tokens": resampler["num_latents"],
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Doors
# ---------------------------------------------------------------------------------------------------------------------


def write_ours(checkpoint: Checkpoint, args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """Write our folder."""
    text_layout = args.text_layout or checkpoint.text_layout
    views = cast(plan_ours(checkpoint, text_layout), dtype)
    report(checkpoint, views, text_layout)
    total = sum(view.num_bytes for view in (*views.values(), *checkpoint.unused.values()))
    check_space(args.output, total)
    changed = checkpoint.dtype_changed or any(
        part.reader.specs[part.name].dtype != view.dtype for view in views.values() for part in view.parts
    )
    with replacing(args.output) as folder:
        config = write_small_files(folder, checkpoint, text_layout, views)
        original = folder / "original"
        original.mkdir()
        copy_files(original, checkpoint.small_files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="write", file=sys.stderr) as progress:
            write_shards(folder, views, args.max_shard_size, progress)
            if checkpoint.unused:
                state = "changed" if changed else "kept"
                path = original / "unused.safetensors"
                write_safetensors(path, checkpoint.unused, progress, weights_dtype=state)
        if args.verify:
            verify_bits(folder, views)
            verify_model(config, views)
    print(f"wrote {len(views)} tensors, {sum(view.num_bytes for view in views.values())} bytes, to {args.output}")


def write_original(checkpoint: Checkpoint, args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """Write the released layout from ours."""
    vocab, num_ids = checkpoint.config["text_config"]["vocab_size"], checkpoint.config["image_token_id"]
    if vocab != num_ids + len(IMAGE_TOKENS):
        raise ValueError(
            f"text_config.vocab_size is {vocab}, but the original layout holds exactly 3 ids from image_token_id "
            f"{num_ids} on. The vocabulary was probably resized after conversion: it has no original form."
        )
    stored = dtype or checkpoint.views[EMBEDDING].dtype
    files, num_dead_rows = original_configs(checkpoint, stored)
    views, lost = unfold(checkpoint, num_dead_rows)
    views = cast({"vlm." + name: view for name, view in sorted(views.items())}, dtype)
    lost += [f"{name} (rebuilt)" for name in files if name not in checkpoint.small_files]
    tokenizer = {name: path for name, path in checkpoint.small_files.items() if name not in files}
    if "tokenizer.json" not in tokenizer:
        found = {name: checkpoint.tokenizer / name for name in TOKENIZER_FILES}
        tokenizer |= {name: path for name, path in found.items() if path.is_file()}
        lost += ["tokenizer files (ours copied)" if tokenizer else "tokenizer files (none found)"]
    total = sum(view.num_bytes for view in views.values())
    check_space(args.output, total)
    with replacing(args.output) as folder:
        for name, content in files.items():
            write_json(folder / name, content)
        copy_files(folder, tokenizer)
        _write_text(folder / "README.md", ORIGINAL_CARD.format(source=checkpoint.description, mark=MARK))
        with tqdm(total=total, unit="B", unit_scale=True, desc="write", file=sys.stderr) as progress:
            write_shards(folder, views, args.max_shard_size, progress)
        if args.verify:
            verify_bits(folder, views)
    print(f"wrote {len(views)} tensors in the original layout to {args.output}")
    print("not restored: " + ("; ".join(lost) if lost else "nothing, everything is as in the original"))


def report(checkpoint: Checkpoint, views: dict[str, View], text_layout: str) -> None:
    """Print what happens to the tensors."""
    folded = [name for name in FOLDED if len(checkpoint.views[name].parts) > 1]
    split = sum(("qkv_proj" in name or "gate_up_proj" in name) for name in checkpoint.views)
    print(f"{checkpoint.description}: flavour {checkpoint.flavour}, {len(checkpoint.views)} tensors used")
    print(f"renamed {sum(to_ours(name) != name for name in checkpoint.views)} tensors")
    print(f"folded {len(folded)}: {', '.join(folded) or 'none'}")
    print(f"split {split if text_layout == 'unfused' else 0} fused text projections; {len(views)} tensors to write")
    fresh = sum(isinstance(part.reader, FreshReader) for view in views.values() for part in view.parts)
    print(f"initialised {fresh} tensors or row ranges (seed {SEED})" if fresh else "initialised none")
    names = ", ".join(sorted(checkpoint.unused)) or "none"
    print(f"kept aside {len(checkpoint.unused)} unused in original/unused.safetensors: {names}")


def parse_size(text: str) -> int:
    """Return bytes.

    >>> parse_size("5GB"), parse_size("2GiB"), parse_size("100")
    (5000000000, 2147483648, 100)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a number with a unit, such as 5GB or 500MiB")
    return int(size)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="convert_weights.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="SOURCE OUTPUT; with --text OUTPUT")
    add = parser.add_argument
    add("--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="default: %(default)s")
    add("--max-shard-size", type=parse_size, default="5GB", help="bytes, with unit; default: %(default)s")
    add("--text-layout", choices=("phi3", "unfused"), help="unfused: mistral; default: phi3, or as SOURCE if ours")
    add("--vision-config", type=Path, metavar="FILE", help="SigLIP config.json; default: inferred, SO400M's heads")
    add("--verify", action="store_true", help="read everything back and compare; default: off")
    add("--to-original", action="store_true", help="SOURCE is ours, write released names; default: off")
    add("--flavour", choices=("auto", "instruct", "base"), default="auto", help="default: %(default)s")
    add("--tokenizer", type=Path, metavar="DIR", help="default: beside the weights")
    add("--source-config", type=Path, metavar="FILE", help="original config.json; default: beside the weights")
    add("--vision", type=Path, metavar="DIR", help="SigLIP, or tower for a .pt without one; default: none")
    add("--text", type=Path, metavar="DIR", help="Phi-3; default: none")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; usage errors exit with code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    num_paths = 1 if args.text else 2
    if args.text and not args.vision:
        parser.error("--text needs --vision: the two together make a starting point")
    if len(args.paths) != num_paths:
        expected = "OUTPUT" if args.text else "SOURCE OUTPUT"
        parser.error(f"{len(args.paths)} paths given, {num_paths} expected ({expected})")
    if args.to_original and args.text_layout:
        parser.error("--text-layout is for our layout; --to-original always writes the released one")
    args.output, args.source = args.paths[-1], args.paths[0] if num_paths == 2 else None
    return args


def load_source(args: argparse.Namespace) -> Checkpoint:
    """Read whichever kind of source was given.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if it is not a source of that kind.
    """
    given = [args.source, args.vision, args.text, args.tokenizer, args.vision_config, args.source_config]
    for path in given:
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; expected a local file or folder (nothing is downloaded). It is probably "
                "misspelt or relative to another folder: check the path."
            )
    if args.source is None:
        return from_backbones(args)
    config = _optional_json(args.source / "config.json") if args.source.is_dir() else None
    is_ours = config is not None and config.get("model_type") == "blip3"
    if args.to_original and not is_ours:
        raise ValueError(
            f"{args.source} is no folder with a config.json of model_type 'blip3', which --to-original starts from. "
            "It is probably already in the original layout: leave --to-original out to convert it to ours."
        )
    ignored = [name for name in ("vision", "vision_config", "source_config") if vars(args)[name] is not None]
    if is_ours and ignored:
        raise ValueError(
            f"{args.source} is one of our folders and --{ignored[0].replace('_', '-')} was given too; such a folder "
            "describes itself. The option is for original checkpoints: leave it out."
        )
    return from_ours(args) if is_ours else from_release(args)


def main(argv: list[str] | None = None) -> int:
    """Convert; return 0, or 1 after printing an error."""
    args = parse_args(argv)
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    try:
        prepare_output(args.output, [path for path in (args.source, args.vision, args.text, args.tokenizer) if path])
        checkpoint = load_source(args)
        (write_original if args.to_original else write_ours)(checkpoint, args, dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
