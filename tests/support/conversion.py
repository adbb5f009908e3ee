# SPDX-License-Identifier: Apache-2.0
"""Functions the converter's test files share; their fixtures are in conversion/conftest.py."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from blip3.conversion import cli as convert_weights
from blip3.conversion.output_folder import group_shards
from blip3.conversion.tensors import Spec, views_of
from support import SHARED

REFERENCE = SHARED / "reference"
TINY = REFERENCE / "fixtures" / "model"
RELEASE = REFERENCE / "release" / "xgen-mm-phi3-mini-base-r-v1.5"
TINY_VISION = TINY / "siglip_vision_config.json"


def refused(capsys, *args) -> str:
    """Run a conversion that must fail with one error, and return the error."""
    capsys.readouterr()
    assert convert_weights.main([str(arg) for arg in args]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def same_bits(first: dict, second: dict) -> bool:
    assert set(first) == set(second)
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert first[name].shape == second[name].shape, name
        assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)), name
    return True


def load_safely(tensors: dict) -> dict:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_release(folder: Path, tensors: dict, num_shards: int = 3) -> Path:
    """Write a sharded release with index beside the tiny configs."""
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    weight_map: dict[str, str] = {}
    names = sorted(tensors)
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number::num_shards]
        save_file({name: tensors[name].clone() for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def released_shape(name: str) -> tuple[int, ...]:
    """Shapes of the released tensors, written down apart from the converter."""
    table = (
        (r"vision_encoder\.embeddings\.patch_embedding\.weight", (1152, 3, 14, 14)),
        (r"vision_encoder\.embeddings\.position_embedding\.weight", (729, 1152)),
        (r"vision_encoder\.head\.probe", (1, 1, 1152)),
        (r"vision_encoder\.head\.attention\.in_proj_weight", (3456, 1152)),
        (r"vision_encoder\.head\.attention\.in_proj_bias", (3456,)),
        (r"vision_encoder\..*fc1\.weight", (4304, 1152)),
        (r"vision_encoder\..*fc1\.bias", (4304,)),
        (r"vision_encoder\..*fc2\.weight", (1152, 4304)),
        (r"vision_encoder\..*_proj\.weight", (1152, 1152)),
        (r"vision_encoder\..*", (1152,)),
        (r"vision_tokenizer\.latents", (128, 1152)),
        (r"vision_tokenizer\.projection\.weight", (3072, 1152)),
        (r"vision_tokenizer\.projection\.bias", (3072,)),
        (r".*to_q\.weight", (1536, 1152)),
        (r".*to_kv\.weight", (3072, 1152)),
        (r".*to_out\.weight", (1152, 1536)),
        (r".*layers\.\d+\.1\.1\.weight", (4608, 1152)),
        (r".*layers\.\d+\.1\.3\.weight", (1152, 4608)),
        (r"vision_tokenizer\..*", (1152,)),
        (r".*additional_(fc|embedding)\.weight", (3, 3072)),
        (r".*additional_fc\.bias", (3,)),
        (r".*(embed_tokens|lm_head)\.weight", (32064, 3072)),
        (r".*lm_head\.bias", (32064,)),
        (r".*qkv_proj\.weight", (9216, 3072)),
        (r".*o_proj\.weight", (3072, 3072)),
        (r".*gate_up_proj\.weight", (16384, 3072)),
        (r".*down_proj\.weight", (3072, 8192)),
        (r"lang_model\..*norm\.weight", (3072,)),
    )
    return next(shape for pattern, shape in table if re.fullmatch(pattern, name.removeprefix("vlm.")))


class HeadersOnly:
    """A reader that has no data, to plan with."""

    def __init__(self, shapes: dict):
        self.specs = {name: Spec(torch.float32, shape) for name, shape in shapes.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        raise AssertionError("planning must not read data")


def write_sparse_release(
    folder: Path, num_layers: int, shard_bytes: int = 100 * 10**6, width: int = 1024, real: bool = False
) -> Path:
    """Write a release of Phi-3-mini's widths, or narrower, whose data are holes (zeros that take no disk)."""
    index = json.loads((RELEASE / "model.safetensors.index.json").read_text())
    shapes = {name: released_shape(name) for name in index["weight_map"]}
    if not real:
        scale = {3072: width, 9216: 3 * width, 8192: 2 * width, 16384: 4 * width}
        in_text = re.compile(r"vlm\.lang_model|vlm\.vision_tokenizer\.projection")
        is_deep = re.compile(rf"lang_model\.model\.layers\.({'|'.join(map(str, range(num_layers, 32)))})\.")
        shapes = {
            name: tuple(scale.get(side, side) for side in shape) if in_text.match(name) else shape
            for name, shape in shapes.items()
            if not is_deep.search(name)
        }
        shapes["vlm.vision_tokenizer.projection.weight"] = (width, 1152)
    folder.mkdir()
    config = json.loads((RELEASE / "config.json").read_text())
    if not real:
        config["text_config"] |= {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 16}
        config["text_config"] |= {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(RELEASE / "preprocessor_config.json", folder / "preprocessor_config.json")
    headers = HeadersOnly(shapes)
    shards = group_shards(views_of(headers), shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_hole(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_hole(path: Path, shard: dict) -> None:
    header, offset = {}, 0
    for name, view in shard.items():
        header[name] = {"dtype": "F32", "shape": view.shape, "data_offsets": [offset, offset + view.num_bytes]}
        offset += view.num_bytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
