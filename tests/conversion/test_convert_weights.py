# SPDX-License-Identifier: Apache-2.0
"""Tests of convert_weights.py: values, verification, usage errors, our own output again and the way back."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from blip3.conversion import cli as convert_weights
from blip3.conversion.names import FOLDED, to_ours, to_released
from blip3.conversion.output_folder import CODE_FILES, ENDPOINT_FILES
from support import ROOT, convert, needs_reference
from support.conversion import REFERENCE, TINY, TINY_VISION, refused, same_bits, tensors_of

pytestmark = needs_reference


def test_release_values(tiny, ours, ours_tensors):
    embed = "vlm.lang_model.model.embed_tokens"
    folded = torch.cat([tiny[f"{embed}.weight"][:212], tiny[f"{embed}.additional_embedding.weight"]])
    assert torch.equal(ours_tensors["model.language_model.embed_tokens.weight"], folded)
    head = torch.cat([tiny["vlm.lang_model.lm_head.bias"][:212], tiny["vlm.lang_model.lm_head.additional_fc.bias"]])
    assert torch.equal(ours_tensors["lm_head.bias"], head)
    key = "layers.0.0.to_kv.weight"
    kv = ours_tensors["model.resampler.layers.0.kv_proj.weight"]
    assert torch.equal(kv, tiny[f"vlm.vision_tokenizer.{key}"])
    config = json.loads((ours / "config.json").read_text())
    assert config["tile_grids"] == [[2, 1], [1, 2], [2, 2], [1, 3], [3, 1]]
    assert config["text_config"]["vocab_size"] == 215
    assert config["text_config"]["sliding_window"] == 2048
    assert config["image_token_id"] == 212
    assert config["dtype"] == "float32"
    assert config["vision_config"]["num_attention_heads"] == 3
    assert config["vision_config"]["image_size"] == 76
    assert config["resampler_config"]["num_latents"] == 8
    assert config["resampler_config"]["intermediate_size"] == 96
    assert "torch_dtype" not in (ours / "config.json").read_text()
    names = {path.relative_to(ours).as_posix() for path in ours.rglob("*")}
    assert {*CODE_FILES, *ENDPOINT_FILES, "README.md", "processor_config.json", "chat_template.jinja"} <= names
    assert json.loads((ours / "preprocessor_config.json").read_text())["size"] == {"height": 76, "width": 76}


def test_verify_sharded_output(tmp_path, ours_tensors, capsys):
    output = tmp_path / "sharded"
    convert(TINY, output, "--vision-config", TINY_VISION, "--max-shard-size", "1MB", "--verify")
    printed = capsys.readouterr().out
    assert "bit for bit" in printed
    assert "against the model" in printed
    assert "not a known release" in printed
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(output.glob("*.safetensors"))) > 2
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in ours_tensors.values())
    assert same_bits(tensors_of(output), ours_tensors)


def test_verify_sees_a_flipped_bit(tmp_path, ours, monkeypatch, capsys):
    real = convert_weights.write_shards

    def damaged(folder, *args):
        real(folder, *args)
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            byte = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(convert_weights, "write_shards", damaged)
    assert "differs from the source" in refused(capsys, ours, tmp_path / "out", "--verify")
    assert list(tmp_path.iterdir()) == []


def test_the_script_runs_from_any_folder(tmp_path):
    command = [sys.executable, ROOT / "convert_weights.py", TINY, "out", "--vision-config", TINY_VISION]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "modeling_blip3.py").read_text() == (ROOT / "modeling_blip3.py").read_text()


def test_usage_errors_exit_with_2(tmp_path, capsys):
    contradiction = ["a", "b", "--to-original", "--text-layout", "unfused"]
    for args in (["only"], ["--text", "x", "out"], ["--text", "x", "--vision", "y", "a", "b"], contradiction):
        with pytest.raises(SystemExit) as exit_info:
            convert_weights.main(args)
        assert exit_info.value.code == 2
    assert "does not exist" in refused(capsys, tmp_path / "nothing", tmp_path / "out")
    assert "misspelt" in refused(capsys, "--vision", tmp_path / "no", "--text", tmp_path / "no", tmp_path / "out")
    assert "leave --to-original out" in refused(capsys, TINY, tmp_path / "out", "--to-original")
    assert (convert_weights.parse_size("5GB"), convert_weights.parse_size("1KiB")) == (5_000_000_000, 1024)


@pytest.mark.parametrize("layout", ["fused", "unfused"])
def test_back_to_original_bit_for_bit(tmp_path, tiny, layout, capsys):
    convert(TINY, tmp_path / "ours", "--vision-config", TINY_VISION, "--text-layout", layout, "--verify")
    convert(tmp_path / "ours", tmp_path / "back", "--to-original", "--verify", "--max-shard-size", "2MB")
    assert "not restored: generation_config.json (rebuilt); tokenizer files (none found)" in capsys.readouterr().out
    assert same_bits(tensors_of(tmp_path / "back"), tiny)
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((TINY / name).read_text())
    convert(tmp_path / "back", tmp_path / "twice", "--vision-config", TINY_VISION, "--text-layout", layout)
    assert same_bits(tensors_of(tmp_path / "twice"), tensors_of(tmp_path / "ours"))


@pytest.mark.parametrize("layout", ["fused", "unfused"])
def test_back_without_the_unused_file(tmp_path, tiny, layout, capsys):
    convert(TINY, tmp_path / "ours", "--vision-config", TINY_VISION, "--text-layout", layout)
    shutil.rmtree(tmp_path / "ours" / "original")
    convert(tmp_path / "ours", tmp_path / "back", "--to-original", "--verify")
    printed = capsys.readouterr().out
    for lost in (*FOLDED, "vision_encoder.head.* (omitted)", "config.json (rebuilt)"):
        assert lost in printed
    expected = {name: tensor.clone() for name, tensor in tiny.items() if ".head." not in name}
    for name in FOLDED:  # 212 ids are padded to 256 rows, as nothing tells the original 264
        expected["vlm." + name] = expected["vlm." + name][:256]
        expected["vlm." + name][212:] = 0
    assert same_bits(tensors_of(tmp_path / "back"), expected)
    text = json.loads((tmp_path / "back" / "config.json").read_text())["text_config"]
    assert (text["initial_tokenizer_len"], text["vocab_size"], text["sliding_window"]) == (212, 256, 2047)
    assert text["model_type"] == "phi3"


def test_unfused_split(tmp_path, tiny):
    convert(TINY, tmp_path / "ours", "--vision-config", TINY_VISION, "--text-layout", "unfused")
    written = tensors_of(tmp_path / "ours")
    prefix = "layers.1.self_attn."
    qkv = tiny[f"vlm.lang_model.model.{prefix}qkv_proj.weight"]
    parts = [written[f"model.language_model.{prefix}{letter}_proj.weight"] for letter in "qkv"]
    assert [len(part) for part in parts] == [48, 48, 48]
    assert torch.equal(torch.cat(parts), qkv)
    text = json.loads((tmp_path / "ours" / "config.json").read_text())["text_config"]
    assert text["model_type"] == "mistral"
    assert text["head_dim"] == 12
    assert text["sliding_window"] == 2048


@pytest.mark.parametrize("layout", ["fused", "unfused"])
def test_converted_model_gives_the_reference_logits(tmp_path, layout):
    """The release's sliding window plus one and the relabelling as mistral, seen from outside."""
    from transformers import AutoModelForImageTextToText

    output = tmp_path / f"tiny_{layout}"
    convert(TINY, output, "--vision-config", TINY_VISION, "--text-layout", layout)
    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, dtype=torch.float32).eval()
    with np.load(REFERENCE / "fixtures" / "cases" / "text_only" / "arrays.npz") as arrays, torch.no_grad():
        ids, mask, expected = (torch.from_numpy(arrays[key]) for key in ("input_ids", "attention_mask", "logits"))
    logits = model(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    assert torch.allclose(logits[seen], expected[seen], atol=2e-4, rtol=0)


def test_our_folder_describes_itself(tmp_path, ours, capsys):
    assert "describes itself" in refused(capsys, ours, tmp_path / "out", "--vision-config", TINY_VISION)


def test_our_output_again(tmp_path, ours, ours_tensors, tiny):
    convert(ours, tmp_path / "half", "--dtype", "bfloat16", "--text-layout", "unfused", "--max-shard-size", "1MB")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["text_config"]["model_type"] == "mistral"
    convert(tmp_path / "half", tmp_path / "same")
    assert same_bits(tensors_of(tmp_path / "same"), tensors_of(tmp_path / "half"))
    convert(tmp_path / "half", tmp_path / "fused", "--verify", "--text-layout", "fused")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in ours_tensors.items()}
    assert same_bits(tensors_of(tmp_path / "fused"), halved)
    convert(tmp_path / "fused", tmp_path / "back", "--to-original")
    assert same_bits(tensors_of(tmp_path / "back"), {name: tensor.to(torch.bfloat16) for name, tensor in tiny.items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_folder_saved_by_transformers(tmp_path, ours, ours_tensors):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(ours, trust_remote_code=True, dtype=torch.float32)
    loaded = {to_ours(to_released(name)): tensor for name, tensor in model.state_dict().items()}
    assert same_bits(loaded, ours_tensors)
    model.save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "again", "--verify")
    assert same_bits(tensors_of(tmp_path / "again"), ours_tensors)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path / "again"))
    for name in ("vision_config", "resampler_config", "text_config"):
        assert {key: second[name][key] for key in first[name]} == first[name]
