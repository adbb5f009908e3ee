# SPDX-License-Identifier: Apache-2.0
"""Towers beyond SigLIP, from the folder that their authors publish to a model that trains, is saved and reloaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPVisionConfig, CLIPVisionModel

from blip3.conversion.names import without_inner
from blip3.hub import model_code
from support import convert, load_model, render_image
from support.conversion import refused, same_bits, tensors_of

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
CLIP = CLIPVisionConfig(**SIZES, intermediate_size=64)
OPEN_CLIP = {
    "model_cfg": {
        "quick_gelu": True,
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 8, "patch_size": 7},
    },
    "preprocess_cfg": {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]},
}
TIMM_ARGS = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 4}
PROMPT = "<|user|>\n<image>\nWhat?<|end|>\n<|assistant|>\n"


@pytest.fixture(scope="module")
def phi3(tiny_source, tmp_path_factory) -> Path:
    """The language model of the random release, as a Phi-3 folder with a tokenizer."""
    folder, prefix = tmp_path_factory.mktemp("text") / "phi3", "vlm.lang_model."
    folder.mkdir()
    tensors = load_file(tiny_source / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix) and "additional" not in name}
    kept.pop(prefix + "lm_head.bias")
    save_file({name.removeprefix(prefix): tensor for name, tensor in kept.items()}, folder / "model.safetensors")
    text = json.loads((tiny_source / "config.json").read_text())["text_config"]
    text.pop("initial_tokenizer_len")
    (folder / "config.json").write_text(json.dumps(text))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((tiny_source / name).read_text())
    return folder


def new_clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIP).eval()


def clip_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A CLIP tower by transformers' names, without those that 4.57 has around it."""
    return {without_inner(name): tensor.clone() for name, tensor in model.state_dict().items() if "ids" not in name}


def clip_features(pixels: torch.Tensor) -> torch.Tensor:
    """Patch tokens after the last norm, by transformers' own tower."""
    model = new_clip()
    norm = getattr(model, "vision_model", model).post_layernorm
    return norm(model(pixels).last_hidden_state)[:, 1:]


def open_clip_names(tensors: dict) -> dict:
    """The same tensors as open_clip names them, written down apart from the converter."""
    renamed = {
        "class_embedding": tensors["embeddings.class_embedding"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "conv1.weight": tensors["embeddings.patch_embedding.weight"],
        "proj": torch.zeros(32, 16),
    }
    for kind in ("weight", "bias"):
        renamed[f"ln_pre.{kind}"] = tensors[f"pre_layrnorm.{kind}"]
        renamed[f"ln_post.{kind}"] = tensors[f"post_layernorm.{kind}"]
        for layer in range(2):
            old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            parts = [tensors[f"{old}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            renamed[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
            for theirs, ours in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                renamed[f"{new}{theirs}.{kind}"] = tensors[f"{old}{ours}.{kind}"]
    return renamed


def timm_names(tensors: dict) -> dict:
    """The same tensors as timm names them."""
    pairs = (
        ("class_embedding", "cls_token"),
        ("positional_embedding", "pos_embed"),
        ("conv1.", "patch_embed.proj."),
        ("ln_pre.", "norm_pre."),
        ("ln_post.", "norm."),
        ("transformer.resblocks.", "blocks."),
        (".attn.in_proj_", ".attn.qkv."),
        (".attn.out_proj.", ".attn.proj."),
        (".ln_1.", ".norm1."),
        (".ln_2.", ".norm2."),
        (".mlp.c_fc.", ".mlp.fc1."),
        (".mlp.c_proj.", ".mlp.fc2."),
    )
    renamed = {}
    for name, tensor in open_clip_names(tensors).items():
        if name == "proj":
            renamed["head.weight"] = tensor.T
            continue
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = tensor.reshape(1, -1, 32) if name in ("cls_token", "pos_embed") else tensor
    return renamed


def write_clip(folder: Path, naming: str) -> Path:
    """Write a CLIP tower as transformers, open_clip or timm publish it."""
    folder.mkdir()
    tensors = clip_tensors(new_clip())
    if naming == "transformers":
        stored = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
        stored["text_model.embeddings.token_embedding.weight"] = torch.zeros(4, 4)
        config = {"model_type": "clip", "vision_config": CLIP.to_dict()}
    elif naming == "open_clip":
        stored = {f"visual.{name}": tensor for name, tensor in open_clip_names(tensors).items()}
        stored["transformer.resblocks.0.ln_1.weight"] = torch.zeros(4)  # of the text tower
        config = None
        (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    else:
        stored = timm_names(tensors) | {"logit_scale": torch.zeros(1)}
        size = {"input_size": [3, 28, 28], "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
        config = {"architecture": "vit_tiny_patch7_clip_quickgelu_28", "pretrained_cfg": size, "num_features": 32}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return folder


def write_timm(folder: Path, architecture: str, **arguments) -> torch.nn.Module:
    """Write an untrained ViT of timm with the config.json of timm's own repositories; return the tower."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    tower = timm.create_model(architecture, pretrained=False, img_size=28, **arguments).eval()
    folder.mkdir()
    save_file({name: tensor.clone() for name, tensor in tower.state_dict().items()}, folder / "model.safetensors")
    pretrained = {"input_size": [3, 28, 28], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    config = {"architecture": architecture, "num_features": 32, "pretrained_cfg": pretrained}
    config |= {"model_args": arguments, "num_classes": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    return tower


@pytest.mark.parametrize("naming", ["transformers", "open_clip", "timm"])
def test_a_clip_tower_under_each_naming(naming, tmp_path, phi3):
    folder = write_clip(tmp_path / "clip", naming)
    options = []
    if naming == "timm":  # whose config.json does not tell the heads of a width that nobody published
        (tmp_path / "sizes.json").write_text(json.dumps(SIZES | {"hidden_act": "quick_gelu"}))
        options = ["--vision-config", tmp_path / "sizes.json"]
    output = tmp_path / "output"
    convert("--vision", folder, "--text", phi3, output, "--verify", *options)
    config = json.loads((output / "config.json").read_text())
    assert {name: config["vision_config"][name] for name in SIZES} == SIZES
    assert config["vision_config"]["hidden_act"] == "quick_gelu"
    written = tensors_of(output)
    prefix = "model.vision_tower.vision_model."
    tower = {name.removeprefix(prefix): tensor for name, tensor in written.items() if name.startswith(prefix)}
    assert same_bits(tower, clip_tensors(new_clip()))
    mean = json.loads((output / "preprocessor_config.json").read_text())["image_mean"]
    assert mean == ([0.48145466, 0.4578275, 0.40821073] if naming == "transformers" else [0.4, 0.4, 0.4])


def test_a_clip_tower_trains_is_saved_and_reloaded(tmp_path, phi3):
    output = tmp_path / "output"
    convert("--vision", write_clip(tmp_path / "clip", "open_clip"), "--text", phi3, output, "--verify")
    train_save_and_reload(output, tmp_path, clip_features)


TIMM_TOWERS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "registers and layer scale": ("vit_tiny_patch16_224", {"reg_tokens": 4, "init_values": 0.1}),
}


@pytest.mark.parametrize("kind", TIMM_TOWERS)
def test_a_vit_of_timm_trains_is_saved_and_reloaded(kind, tmp_path, phi3):
    architecture, arguments = TIMM_TOWERS[kind]
    arguments = TIMM_ARGS | arguments
    tower, output = write_timm(tmp_path / "timm", architecture, **arguments), tmp_path / "output"
    convert("--vision", tmp_path / "timm", "--text", phi3, output, "--verify")
    first = tower.num_prefix_tokens
    train_save_and_reload(output, tmp_path, lambda pixels: tower.forward_features(pixels)[:, first:])


def train_save_and_reload(output: Path, tmp_path: Path, features_of) -> None:
    """Compare the tower with its own library's, take a step, and follow the weights through files."""
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    model = load_model(output)
    inputs = processor(text=PROMPT, images=render_image(50, 60), return_tensors="pt")
    with torch.no_grad():
        features = model.eval().get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        expected = features_of(inputs["pixel_values"][0])[: len(features.last_hidden_state)]
    torch.testing.assert_close(features.last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert not [name for name in without if "vision_tower" in name and "k_proj.bias" not in name]
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "trained")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert (expected - load_model(output).eval()(**inputs).logits).abs().max() > 1e-3
        torch.testing.assert_close(load_model(tmp_path / "trained").eval()(**inputs).logits, expected, rtol=0, atol=0)
        convert(tmp_path / "trained", tmp_path / "again", "--base", output, "--verify")
        again = load_model(tmp_path / "again").eval()
        torch.testing.assert_close(again(**inputs).logits, expected, rtol=0, atol=0)
    again.load_state_dict(
        {name: tensor.clone() for name, tensor in tensors_of(tmp_path / "trained").items()}, strict=True
    )  # as Trainer does when it resumes


def test_a_tower_keeps_a_name_that_reading_would_complete(monkeypatch):
    """Transformers 5 adds `timm_model` where a file lacks it, and so would take it away on saving; 4.57 needs it."""
    loading = pytest.importorskip("transformers.core_model_loading")
    adds, removes = (
        loading.PrefixChange(prefix_to_add="timm_model"),
        loading.PrefixChange(prefix_to_remove="vision_model"),
    )
    for conversion in (adds, removes):
        conversion.scope_prefix = "vision_tower"
    towers = model_code("towers_blip3")
    monkeypatch.setattr(towers, "get_model_conversion_mapping", lambda *_, **__: [adds, removes])
    model = torch.nn.Module()
    towers.name_tower_for_both_lines(model)
    assert model._weight_conversions == [removes]


def test_parts_of_two_families_have_no_original_form(tmp_path, phi3, capsys):
    output = tmp_path / "output"
    convert("--vision", write_clip(tmp_path / "clip", "transformers"), "--text", phi3, output)
    assert "it has no original form" in refused(capsys, output, tmp_path / "back", "--to-original")


def test_what_is_no_tower_is_refused(tmp_path, phi3, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    save_file({"stem.weight": torch.zeros(2)}, folder / "model.safetensors")
    error = refused(capsys, "--vision", folder, "--text", phi3, tmp_path / "output")
    assert "none is a patch embedding" in error
    assert "stem.weight" in error
