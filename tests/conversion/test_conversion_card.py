# SPDX-License-Identifier: Apache-2.0
"""The card, NOTICE and .gitattributes of a converted folder: valid, true to the source, and without local paths."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText

from blip3.conversion import card
from blip3.conversion.card import RELEASES, released_origin
from support import ROOT, convert, render_image
from support.conversion import refused

INTERLEAVE = "xgen-mm-phi3-mini-instruct-interleave-r-v1.5"


def header(folder: Path) -> dict:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict()


def vision_config(source: Path) -> tuple:
    return ("--vision-config", source / "siglip_vision_config.json")


@pytest.fixture(scope="module")
def named(tiny_source, tmp_path_factory):
    """The tiny source under a release's name, converted."""
    folder = tmp_path_factory.mktemp("named")
    source = shutil.copytree(tiny_source, folder / INTERLEAVE)
    convert(source, folder / "blip3-4b", *vision_config(source), "--dtype", "bfloat16", "--verify")
    return folder / "blip3-4b"


def test_the_header_names_what_the_hub_asks_for(named):
    assert header(named) == {
        "license": "apache-2.0",
        "base_model": [f"Salesforce/{INTERLEAVE}"],
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["blip3", "xgen-mm", "vision-language", "multi-image", "custom_code"],
    }
    text = (named / "README.md").read_text(encoding="utf-8")
    for section in ("## Load", "## Prompt", "## Limits", "## How it was made"):
        assert section in text
    assert f"python convert_weights.py {INTERLEAVE} OUTPUT --vision-config VISION_CONFIG --dtype bfloat16" in text
    assert "<|system|>\nA chat between" in text
    assert "its checksums were not compared" in text
    assert f"Salesforce/{INTERLEAVE}" in (named / "NOTICE").read_text(encoding="utf-8")
    assert (named / "LICENSE").is_file()


def test_an_unknown_source_says_so_and_takes_what_is_given(tiny_source, tiny_repo, tmp_path):
    assert {"license", "base_model", "language"}.isdisjoint(header(tiny_repo))
    text = (tiny_repo / "README.md").read_text(encoding="utf-8")
    assert "does not recognise as a release" in text
    assert "whoever publishes this folder adds it" in text
    given = ("--base-model", "someone/first", "--base-model", "someone/second", "--license", "mit")
    convert(tiny_source, tmp_path / "out", *vision_config(tiny_source), *given)
    assert header(tmp_path / "out")["base_model"] == ["someone/first", "someone/second"]
    assert header(tmp_path / "out")["license"] == "mit"
    assert "from a checkpoint based on [someone/first]" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("sampling", "grids", "line"),
    [
        ("patch", [[2, 1], [2, 2]], "24, 40, 8 with `do_image_splitting=False`"),
        ("patch", [], "8 with `do_image_splitting=False`"),
        ("fixed", [[2, 1], [2, 2]], "8"),
    ],
)
def test_the_card_names_the_tokens_an_image_takes(tiny_repo, tmp_path, sampling, grids, line):
    """With `token_sampling: fixed` an image takes the latents once, however it is cut."""
    folder = shutil.copytree(tiny_repo, tmp_path / "folder")
    for name, section, key, value in (
        ("config.json", "resampler_config", "token_sampling", sampling),
        ("processor_config.json", "", "token_sampling", sampling),
        ("config.json", "", "tile_grids", grids),
        ("preprocessor_config.json", "", "tile_grids", grids),
    ):
        values = json.loads((folder / name).read_text())
        (values[section] if section else values)[key] = value
        (folder / name).write_text(json.dumps(values))
    convert(folder, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| image tokens an image takes | {line} |" in text


def test_a_release_is_recognised_by_checksum_name_and_cache(tmp_path):
    cached = tmp_path / f"models--Salesforce--{INTERLEAVE}" / "snapshots" / ("0" * 40)
    by_cache = released_origin(cached, None, "instruct")
    assert by_cache == released_origin(tmp_path / INTERLEAVE, None, "instruct")
    assert by_cache.base_models == (f"Salesforce/{INTERLEAVE}",)
    base = "xgen-mm-phi3-mini-base-r-v1.5"
    checked = released_origin(tmp_path / "anything", base, "base")
    assert checked.base_models == (f"Salesforce/{base}",)
    assert (checked.is_by_name, by_cache.is_by_name) == (False, True)
    assert released_origin(tmp_path / INTERLEAVE, None, "base").base_models == ()  # the preprocessor says otherwise
    assert released_origin(tmp_path / INTERLEAVE / "deeper", None, "instruct").base_models == ()
    first = {f"{name}-phi3-mini-{kind}-r-v1" for name in ("xgen-mm", "blip3") for kind in ("base", "instruct")}
    assert {name for name in RELEASES if not name.endswith("r-v1.5")} == first
    assert {"base", "singleimg", "interleave", "dpo"} == {name.split("-")[-3] for name in set(RELEASES) - first}


def test_the_card_survives_another_conversion_and_the_way_back(named, tmp_path):
    convert(named, tmp_path / "again", "--dtype", "float32")
    assert header(tmp_path / "again") == header(named)
    assert "its checksums were not compared" in (tmp_path / "again" / "README.md").read_text()
    assert f"from the release [Salesforce/{INTERLEAVE}]" in (tmp_path / "again" / "README.md").read_text()
    convert(named, tmp_path / "back", "--to-original")
    assert header(tmp_path / "back") == header(named)
    assert "--to-original" in (tmp_path / "back" / "README.md").read_text()


def test_trained_weights_beside_a_release_card_are_no_release(named, tmp_path):
    trained = shutil.copytree(named, tmp_path / "trained")
    model = AutoModelForImageTextToText.from_pretrained(trained, trust_remote_code=True)
    with torch.no_grad():
        model.lm_head.bias += 1
    model.save_pretrained(trained)
    convert(trained, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "not recognised as a release" in text
    assert f"based on [Salesforce/{INTERLEAVE}]" in text


def write_card(folder: Path, head: str, body: str = "# A model\n") -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{head}\n---\n{body}", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("own", "base", "models", "license"),
    [
        (
            "license: mit\nbase_model: someone/mine",
            "license: apache-2.0\nbase_model: [a/b, c/d]",
            ["someone/mine"],
            "mit",
        ),
        ("language: en", "license: apache-2.0\nbase_model: [a/b, c/d]", ["a/b", "c/d"], "apache-2.0"),
        ("base_model: someone/mine", "license: apache-2.0", ["someone/mine"], "apache-2.0"),
        ("base_model: ./here\nlicense: mit", "base_model: ../elsewhere/model", [], "mit"),
        ("base_model: outputs/run", "license: mit", [], "mit"),  # a folder of the machine
        ("tags: [generated_from_trainer]\nbase_model: some/folder\nlicense: x", "license: mit", [], "mit"),
        ("library_name: peft\nbase_model: some/folder", "license: mit", [], "mit"),
        ("license: [mit\nbase", "license: mit", [], "mit"),  # no YAML
    ],
)
def test_licence_and_base_model_come_from_any_card_but_a_trainers(tmp_path, monkeypatch, own, base, models, license):
    monkeypatch.chdir(tmp_path)
    Path("outputs/run").mkdir(parents=True)
    own, base = write_card(tmp_path / "own", own), write_card(tmp_path / "base", base)
    origin = card.card_origin(own, base, is_as_written=True)
    assert (list(origin.base_models), origin.license) == (models, license)
    assert not origin.is_release
    assert not origin.is_by_name


@pytest.mark.parametrize("kind", ["named", "tiny_repo", "back"])
def test_no_file_names_a_local_path(kind, request, named, tmp_path):
    folder = tmp_path / "back" if kind == "back" else request.getfixturevalue(kind)
    if kind == "back":
        convert(named, folder, "--to-original")
    private = [str(tmp_path.parents[2]), str(Path.home()), str(ROOT)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        for text in private:
            assert text.encode() not in path.read_bytes(), f"{path.name} names {text}"


def test_paths_that_transformers_notes_are_left_out(tiny_source, tmp_path):
    import json

    source = shutil.copytree(tiny_source, tmp_path / "source")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        (source / name).write_text(
            json.dumps(content | {"_name_or_path": str(tmp_path), "name_or_path": str(Path.home() / "me")})
        )
    convert(source, tmp_path / "out", *vision_config(source))
    convert(tmp_path / "out", tmp_path / "back", "--to-original")
    for folder in ("out", "back"):
        for path in (tmp_path / folder).rglob("*.json"):
            assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
            assert str(Path.home()) not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("variant", ["instruct", "base"])
def test_the_code_on_the_card_runs(tiny_source, tiny_repo, tmp_path, variant, monkeypatch, capsys):
    folder = tiny_repo
    if variant == "base":
        folder = tmp_path / "base"
        convert(tiny_source, folder, *vision_config(tiny_source), "--variant", "base")
        assert not (folder / "chat_template.jinja").exists()
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert ("<|endofchunk|>" in text) == (variant == "base")
    for name, seed in (("street.jpg", 1), ("harbour.jpg", 2)):
        render_image(200, 300, seed=seed).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict = {}
    for block in blocks:
        code = block.replace("<owner>/<name>", str(folder)).replace("<commit>", "main")
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["ids"].shape[1] > namespace["inputs"]["input_ids"].shape[1]


def test_git_stores_weights_and_large_tokenizers_apart(tiny_repo, tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path / "hub"], check=True)
    (tmp_path / "hub" / "tokenizer.json").write_bytes(b" " * 11 * 2**20)
    card.write_attributes(tmp_path / "hub")
    names = ["model-00001-of-00002.safetensors", "original/unused.safetensors", "tokenizer.json", "config.json"]
    run = ["git", "check-attr", "filter", *names]
    found = subprocess.run(run, cwd=tmp_path / "hub", check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split(": ")[-1] for line in found] == ["lfs", "lfs", "lfs", "unspecified"]
    assert "tokenizer.json" not in (tiny_repo / ".gitattributes").read_text()


def test_a_base_that_is_none_is_refused(tiny_source, tiny_repo, tmp_path, capsys):
    assert "pass that, or leave it out" in refused(capsys, tiny_repo, tmp_path / "out", "--base", tiny_source)
    assert "pass that, or leave it out" in refused(capsys, tiny_source, tmp_path / "out", "--base", tiny_repo)
