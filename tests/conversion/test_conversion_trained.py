# SPDX-License-Identifier: Apache-2.0
"""Folders that `Trainer`, TRL and PEFT save become complete with one command, and answer from a new process."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from blip3.conversion.output_folder import CODE_FILES, ENDPOINT_FILES
from support import convert
from support.conversion import refused, tensors_of
from support.serving import SMALL_MODEL, complete_folder

ANSWER = """
import json, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from blip3.serving.endpoint import EndpointHandler
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
handler = EndpointHandler(folder)
white = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mP8/x8AAwMCAO+ip1sAAAAASUVORK5CYII="
inputs = {"text": sys.argv[2]} if len(sys.argv) > 2 else {"image": white, "text": "What colour is it?"}
(answer,) = handler({"inputs": inputs, "parameters": {"max_new_tokens": 4, "do_sample": False}})
print(json.dumps({"answer": answer, "bias": model.lm_head.bias.sum().item(), "grids": processor.image_processor.tile_grids}))
"""  # noqa: E501


FORK = """
import json, os, sys
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

program = sys.argv[1]
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        folder, *sys.argv[1:] = json.loads(line)
        os.chdir(folder)
        exec(program)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    print("end", flush=True)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small model as a folder of ours: complete, with a card."""
    folder = tmp_path_factory.mktemp("base")
    convert(complete_folder(SMALL_MODEL, folder / "source"), folder / "blip3-mini", "--license", "apache-2.0")
    return folder / "blip3-mini"


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.bias += 1  # "trained"
    return model


def save_model(base, output):
    load(base).save_pretrained(output)


def save_model_and_processor(base, output):
    load(base).save_pretrained(output)
    AutoProcessor.from_pretrained(base, trust_remote_code=True).save_pretrained(output)


def save_trainer(base, output):
    processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
    arguments = TrainingArguments(output_dir=str(output), use_cpu=True, report_to=[])
    trainer = Trainer(model=load(base), args=arguments, processing_class=processor)
    trainer.save_model()
    trainer.create_model_card(model_name="trained", finetuned_from=str(base))  # a card that names the local folder


def save_merged_lora(base, output):
    config = LoraConfig(target_modules=r".*language_model.*\.o_proj", init_lora_weights=False)
    get_peft_model(load(base), config).merge_and_unload().save_pretrained(output)


SAVED = (save_model, save_model_and_processor, save_trainer, save_merged_lora)


@pytest.fixture(scope="module")
def answer():
    """Load and ask a folder, each in a process of its own that sees nothing else of this repository."""
    command = [sys.executable, "-I", "-c", FORK, ANSWER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def answer(folder, *text):
            process.stdin.write(json.dumps([str(folder.parent), str(folder), *text]) + "\n")
            process.stdin.flush()
            lines = list(itertools.takewhile(lambda line: line != "end\n", process.stdout))
            assert lines, "no answer: standard error says why"
            return json.loads(lines[-1])

        yield answer
        process.stdin.close()


@pytest.mark.parametrize("save", SAVED, ids=lambda save: save.__name__)
def test_a_saved_folder_becomes_complete(base, answer, tmp_path, save):
    save(base, tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "out", "--base", base, "--verify")
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    processor_files = {"preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    others = {"README.md", "LICENSE", "NOTICE", ".gitattributes", "generation_config.json", "chat_template.jinja"}
    assert {*CODE_FILES, *ENDPOINT_FILES, *processor_files, *others} <= names
    for name in (*processor_files, "chat_template.jinja", "generation_config.json"):
        if name.endswith(".jinja") or name == "tokenizer.json":
            assert (out / name).read_bytes() == (base / name).read_bytes()
    first, second = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (base, out))
    assert second == first
    assert json.loads((out / "processor_config.json").read_text()) == json.loads(
        (base / "processor_config.json").read_text()
    )
    data = ModelCard((out / "README.md").read_text(encoding="utf-8")).data
    assert data.license == "apache-2.0"
    assert "not recognised as a release" in (out / "README.md").read_text(encoding="utf-8")
    for path in out.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
        assert not path.is_file() or str(base.parent).encode() not in path.read_bytes(), path
    shutil.rmtree(tmp_path / "trained")
    found = answer(out)
    expected = tensors_of(base)["lm_head.bias"].float().sum().item() + tensors_of(base)["lm_head.bias"].numel()
    assert found["bias"] == pytest.approx(expected, rel=1e-3)
    assert found["answer"]["generated_tokens"] > 0
    assert found["grids"] == json.loads((base / "config.json").read_text())["tile_grids"]


@pytest.mark.parametrize("save", [save_model, save_trainer], ids=lambda save: save.__name__)
def test_a_folder_trained_from_the_repository_keeps_the_licence_of_its_card(tmp_path, save):
    """As docs/finetuning.md says: `--base .`, whose README this script did not write."""
    save(SMALL_MODEL, tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "out", "--base", SMALL_MODEL)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: apache-2.0\n" in text.split("---\n")[1]
    assert "base_model" not in text.split("---\n")[1]
    assert "Licence of the weights: apache-2.0." in (tmp_path / "out" / "NOTICE").read_text(encoding="utf-8")


def test_without_a_base_what_is_missing_is_named(base, tmp_path, capsys):
    save_model(base, tmp_path / "trained")
    convert(tmp_path / "trained", tmp_path / "out")
    assert "--base" in capsys.readouterr().err


def test_a_base_with_another_tokenizer_is_refused(base, tmp_path, tiny_repo, capsys):
    save_model(base, tmp_path / "trained")
    assert "It probably belongs to another model" in refused(
        capsys, tmp_path / "trained", tmp_path / "out", "--base", tiny_repo
    )


def test_a_base_model_without_a_chat_template_stays_one(answer, tmp_path):
    source = complete_folder(SMALL_MODEL / "base", tmp_path / "source")
    convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours" / "chat_template.jinja").exists()
    assert answer(tmp_path / "ours", "A red")["answer"]["generated_tokens"] > 0


def test_an_adapter_is_refused_with_the_line_that_merges_it(base, answer, tmp_path, capsys):
    config = LoraConfig(target_modules=r".*language_model.*\.o_proj", init_lora_weights=False)
    model = get_peft_model(load(base), config)
    model.save_pretrained(tmp_path / "adapter")
    message = refused(capsys, tmp_path / "adapter", tmp_path / "out", "--base", base)
    (line,) = re.findall(r"run  (python -c \".*?\")  and", message)
    line = line.replace("python", sys.executable, 1)
    subprocess.run(line, shell=True, check=True, cwd=tmp_path, capture_output=True)
    convert(tmp_path / "MERGED", tmp_path / "out", "--base", base)
    name = "model.language_model.layers.0.self_attn.o_proj.weight"
    merged = tensors_of(tmp_path / "out")[name].float()
    assert not torch.allclose(merged, tensors_of(base)[name].float(), atol=1e-3)
    assert answer(tmp_path / "out")["answer"]["generated_tokens"] > 0
