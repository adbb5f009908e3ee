# SPDX-License-Identifier: Apache-2.0
"""Tests of the sources: names and sizes of the real release, LAVIS files, backbones, damaged files."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blip3.conversion.configs import Checkpoint, read_json, released_config, tile_grids_of, unfused_text_config
from blip3.conversion.names import DEAD_ROWS, FOLDED, KNOWN_RELEASES, POOLING_HEAD, check_shapes, to_ours, to_released
from blip3.conversion.output_folder import model_shapes, plan_ours
from blip3.conversion.sources import released_views
from blip3.conversion.tensors import fold, shapes_of
from blip3.conversion.tokenizer_files import added_token
from support import RELEASE as RELEASED
from support import convert, needs_reference
from support.conversion import (
    REFERENCE,
    RELEASE,
    TINY,
    TINY_VISION,
    HeadersOnly,
    load_safely,
    refused,
    released_shape,
    same_bits,
    tensors_of,
    write_release,
)

pytestmark = needs_reference


@pytest.fixture(scope="session")
def real_plan() -> tuple[dict, dict, dict]:
    index = json.loads((RELEASE / "model.safetensors.index.json").read_text())
    shapes = {name: released_shape(name) for name in index["weight_map"]}
    assert len(shapes) == 718
    assert 4 * sum(math.prod(shape) for shape in shapes.values()) == index["metadata"]["total_size"]
    views = released_views(HeadersOnly(shapes), "the index")
    source, preprocessor = (read_json(RELEASE / name) for name in ("config.json", "preprocessor_config.json"))
    config, variant = released_config(views, source, preprocessor, None, "auto")
    assert variant == "base"
    assert config["tile_grids"] == []
    used, unused = fold(views, config["image_token_id"])
    check_shapes(shapes_of(used), config, "the index")
    return used, unused, config


def test_real_index_is_used_up(real_plan):
    used, unused, config = real_plan
    assert len([name for name in unused if name.startswith(POOLING_HEAD)]) == 11
    assert sorted(name for name in unused if name.startswith(DEAD_ROWS)) == sorted(DEAD_ROWS + name for name in FOLDED)
    assert len(used) == 718 - 11 - 3
    assert sum(math.prod(view.shape) for view in [*used.values(), *unused.values()]) == 4_359_257_219
    template = read_json(RELEASED / "config.json")
    for name in ("vision_config", "resampler_config", "text_config"):
        assert config[name] == template[name]
    assert config["image_token_id"] == 32012
    assert config["text_config"]["sliding_window"] == 2048


@pytest.mark.parametrize("layout", ["fused", "unfused"])
def test_real_plan_equals_the_model(real_plan, layout):
    used, unused, config = real_plan
    checkpoint = Checkpoint(used, unused, config, {}, {}, "base", "the index", tokenizer=RELEASE)
    plan = plan_ours(checkpoint, layout)
    model_config = read_json(RELEASED / "config.json")
    if layout == "unfused":
        model_config["text_config"] = unfused_text_config(model_config["text_config"])
    assert model_shapes(model_config) == {name: view.shape for name, view in plan.items()}


def test_names_there_and_back(real_plan):
    for name in real_plan[0]:
        assert to_released(to_ours(name)) == name
        assert to_ours(name) != name
    newer = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert to_released(newer) == "vision_encoder.encoder.layers.0.mlp.fc1.weight"
    assert to_ours("vision_tokenizer.layers.1.0.to_kv.weight") == "model.resampler.layers.1.kv_proj.weight"
    assert to_ours("vision_tokenizer.layers.10.1.0.bias") == "model.resampler.layers.10.mlp_norm.bias"


def test_grids_in_pixels_become_rows_and_columns():
    pixels = [[384, 768], [768, 384], [768, 768], [1152, 384], [384, 1152]]
    assert tile_grids_of(pixels, "instruct", 384) == [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]]
    assert tile_grids_of(pixels, "base", 384) == []
    assert tile_grids_of(None, "instruct", 384) == read_json(RELEASED / "config.json")["tile_grids"]
    with pytest.raises(ValueError, match="no whole number of tiles"):
        tile_grids_of([[384, 700]], "instruct", 384)


def lavis(tiny: dict, variant: str) -> dict:
    bare = {name.removeprefix("vlm."): tensor for name, tensor in tiny.items()}
    if variant == "bare":
        return bare
    if variant == "wrapped":
        return {"epoch": 0, "step": 5, "model_state_dict": bare, "optimizer_state_dict": {"state": {}}}
    trained = {name: tensor for name, tensor in bare.items() if not name.startswith("vision_encoder.")}
    return {"model_state_dict": {f"module.{name}": tensor for name, tensor in trained.items()}}


@pytest.mark.parametrize("variant", ["bare", "wrapped", "ddp"])
def test_lavis_variants(tmp_path, tiny, ours_tensors, variant, monkeypatch):
    monkeypatch.setattr("blip3.conversion.tensors.REMAP_BYTES", 100_000)
    source = tmp_path / "checkpoint.pt"
    torch.save(lavis(tiny, variant), source)
    shutil.copyfile(TINY / "config.json", tmp_path / "config.json")
    extra = ("--vision", TINY) if variant == "ddp" else ()
    convert(source, tmp_path / "out", "--vision-config", TINY_VISION, "--verify", *extra)
    assert same_bits(tensors_of(tmp_path / "out"), ours_tensors)


def test_lavis_refusals(tmp_path, tiny, capsys):
    source = tmp_path / "checkpoint.pt"
    torch.save(lavis(tiny, "ddp"), source)
    args = (source, tmp_path / "out", "--vision-config", TINY_VISION)
    assert "pass --vision DIR" in refused(capsys, *args)
    assert "--source-config" in refused(capsys, *args, "--vision", TINY)
    convert(*args, "--vision", TINY, "--source-config", TINY / "config.json")
    torch.save(lavis(tiny, "bare"), source)
    assert "only one can be used" in refused(capsys, *args, "--vision", TINY)
    whole = source.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a torch file", b""):
        source.write_bytes(content)
        assert "cannot be read by torch.load" in refused(capsys, *args)
    torch.save({"step": 3}, source)
    assert "holds no state dict" in refused(capsys, *args)
    with_other = {"other.weight": torch.zeros(2)}
    torch.save(with_other, source)
    assert "probably another model" in refused(capsys, *args)


def test_heads_must_be_known(tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(TINY, source, ignore=shutil.ignore_patterns("siglip_vision_config.json"))
    assert "--vision-config" in refused(capsys, source, tmp_path / "out")


def timm_names(tower: dict, prefix: str) -> dict:
    """Rename a transformers tower to timm's names, apart from the converter."""
    result = {prefix + "attn_pool.latent": torch.zeros(1, 1, 24), "logit_scale": torch.zeros(1)}
    for name, tensor in tower.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if name.startswith("head.") or (match and re.search(r"[kv]_proj", name)):
            continue
        if match and "q_proj" in name:
            tensor = torch.cat([tower[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        name = name.replace(f"encoder.layers.{match[1]}." if match else "\0", f"blocks.{match[1]}." if match else "")
        for old, new in (
            ("self_attn.q_proj", "attn.qkv"),
            ("self_attn.out_proj", "attn.proj"),
            ("layer_norm", "norm"),
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("post_layernorm", "norm"),
        ):
            name = name.replace(old, new)
        if name == "embeddings.position_embedding.weight":
            name, tensor = "pos_embed", tensor[None]
        result[prefix + name] = tensor.contiguous()
    return result


@pytest.fixture
def phi3_folder(tmp_path, tiny) -> Path:
    """A tiny Phi-3 with a real tokenizer's shape: 12 ids, 16 rows."""
    folder = tmp_path / "phi3"
    folder.mkdir()
    prefix = "vlm.lang_model."
    keep = {name: tensor for name, tensor in tiny.items() if name.startswith(prefix) and "additional" not in name}
    keep = {name.removeprefix(prefix): tensor for name, tensor in keep.items() if name != prefix + "lm_head.bias"}
    save_file(keep, folder / "model.safetensors")
    text = json.loads((TINY / "config.json").read_text())["text_config"]
    text.pop("initial_tokenizer_len")
    (folder / "config.json").write_text(json.dumps(text))
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(40, 246))])}
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    model |= {"vocab": vocab, "merges": []}
    added = [added_token(token, vocab[token]) for token in ("<unk>", "<s>", "</s>")]
    added.append(added_token("<|endoftext|>", 210))
    tokenizer: dict[str, Any] = {"version": "1.0", "added_tokens": added, "model": model}
    tokenizer |= dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize("naming", ["vision_model.", "", "siglip", "visual.trunk.", "timm"])
def test_starting_point(tmp_path, tiny, ours_tensors, phi3_folder, naming):
    prefix = "vlm.vision_encoder."
    tower = {name.removeprefix(prefix): tensor for name, tensor in tiny.items() if name.startswith(prefix)}
    vision = tmp_path / "siglip"
    vision.mkdir()
    if naming in ("visual.trunk.", "timm"):
        stored = timm_names(tower, naming if naming != "timm" else "")
    else:
        outer = "vision_model." if naming == "siglip" else naming
        stored = {outer + name: tensor for name, tensor in tower.items()}
        stored |= {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 4)} if naming == "siglip" else {}
    save_file({name: tensor.clone() for name, tensor in stored.items()}, vision / "model.safetensors")
    (vision / "config.json").write_text(json.dumps({"vision_config": json.loads(TINY_VISION.read_text())}))
    output = tmp_path / "out"
    convert("--vision", vision, "--text", phi3_folder, output, "--verify")
    written = tensors_of(output)
    assert {name: tensor.shape for name, tensor in written.items() if "resampler" not in name} == {
        name: tensor.shape for name, tensor in ours_tensors.items() if "resampler" not in name
    }
    tower_names = [name for name in written if name.startswith("model.vision_tower.")]
    assert same_bits({n: written[n] for n in tower_names}, {n: ours_tensors[n] for n in tower_names})
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(written[name][:212], ours_tensors[name][:212])
        assert 0.01 < written[name][212:].std() < 0.03
    assert not written["lm_head.bias"].any()
    assert torch.all(written["model.resampler.layers.0.mlp_norm.weight"] == 1)
    assert not written["model.resampler.layers.5.patch_norm.bias"].any()
    assert abs(written["model.resampler.layers.0.q_proj.weight"].std() - 0.02) < 1e-3
    assert written["model.resampler.latents"].shape == (128, 24)
    assert written["model.resampler.latents"].std() > 0.01
    assert not written["model.resampler.projection.bias"].any()
    config = json.loads((output / "config.json").read_text())
    assert config["image_token_id"] == 212
    assert config["text_config"]["pad_token_id"] == 211
    again = tmp_path / "again"
    convert("--vision", vision, "--text", phi3_folder, again)
    assert same_bits(tensors_of(again), written)


def test_damaged_releases(tmp_path, tiny, capsys):
    def error(change) -> str:
        folder = tmp_path / "source"
        shutil.rmtree(folder, ignore_errors=True)
        write_release(folder, tiny)
        change(folder)
        return refused(capsys, folder, tmp_path / "out", "--vision-config", TINY_VISION)

    second = "model-00002-of-00003.safetensors"

    def truncate(folder, size):
        os.truncate(folder / second, (folder / second).stat().st_size - size if size > 0 else -size)

    def garble(folder):
        with (folder / second).open("r+b") as file:
            file.seek(8)
            file.write(b"\xff" * 40)

    assert f"not there: {second}" in error(lambda folder: (folder / second).unlink())
    assert "so 100 are missing" in error(lambda folder: truncate(folder, 100))
    assert "no readable safetensors header" in error(lambda folder: truncate(folder, -100))
    assert "no readable safetensors header" in error(lambda folder: truncate(folder, -4))
    assert "no readable safetensors header" in error(garble)
    assert "is not JSON" in error(lambda folder: (folder / "config.json").write_text("{"))
    assert "config.json does not exist" in error(lambda folder: (folder / "config.json").unlink())
    moved = {name: tensor for name, tensor in load_safely(tiny).items() if "to_q" not in name}
    assert "stand in two files" in error(lambda folder: save_file(moved, folder / second))
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vlm.vision_tokenizer.layers.3.0.to_q.weight": None}, "1 are missing: vision_tokenizer.layers.3.0.to_q"),
        ({"vlm.lang_model.lm_head.bias": None}, "missing: lang_model.lm_head.bias"),
        ({"vlm.lang_model.model.embed_tokens.additional_embedding.weight": None}, "another shape"),
        ({"vlm.vision_tokenizer.frame_embs": (4, 24)}, "1 are unexpected: vision_tokenizer.frame_embs"),
        ({"vlm.vision_tokenizer.projection.bias": (47,)}, "projection.bias is [47], expected [48]"),
        ({"vlm.lang_model.lm_head.weight": (300, 48)}, "has 300 rows"),
        ({"vlm.lang_model.lm_head.weight": (100, 48)}, "has 100 rows"),
        ({"vlm.vision_encoder.embeddings.position_embedding.weight": (26, 24)}, "has 26 positions"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tiny, capsys, change, message):
    tensors = load_safely(tiny) | {name: torch.zeros(shape) for name, shape in change.items() if shape}
    tensors = {name: tensor for name, tensor in tensors.items() if change.get(name, True) is not None}
    folder = write_release(tmp_path / "source", tensors)
    assert message in refused(capsys, folder, tmp_path / "out", "--vision-config", TINY_VISION)


def test_known_release_hashes(tmp_path, tiny, capsys, monkeypatch):

    folder = write_release(tmp_path / "source", tiny)
    shards = sorted(folder.glob("*.safetensors"))
    table = {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) for path in shards}
    monkeypatch.setattr("blip3.conversion.sources.KNOWN_RELEASES", {"tiny-release": table})
    args = (folder, tmp_path / "out", "--vision-config", TINY_VISION)
    convert(*args)
    assert "is tiny-release: sha256 of 3 shards as released" in capsys.readouterr().out
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    assert f"{shards[1].name} has sha256" in refused(capsys, *args)
    monkeypatch.setattr(
        "blip3.conversion.sources.KNOWN_RELEASES", {"other": {name: (h, n + 1) for name, (h, n) in table.items()}}
    )
    convert(*args)
    assert "not a known release: hashes not checked" in capsys.readouterr().out


def test_known_releases_are_the_shared_ones():
    for listing in (REFERENCE / "release").glob("*/shards.sha256.txt"):
        lines = [line.split() for line in listing.read_text().splitlines()]
        assert KNOWN_RELEASES[listing.parent.name] == {name: (digest, int(size)) for name, digest, size in lines}
    assert len(KNOWN_RELEASES) == len(list((REFERENCE / "release").glob("*/shards.sha256.txt")))


def test_vision_sizes_beside_the_weights_are_found(tiny_source, tmp_path):
    output = tmp_path / "converted"
    convert(tiny_source, output)
    config = json.loads((output / "config.json").read_text())
    assert config["vision_config"]["num_attention_heads"] == 2
