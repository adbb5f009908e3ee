# SPDX-License-Identifier: Apache-2.0
"""The scripts and the notebook of examples/, run as users run them, on the small model."""

import ast
import hashlib
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from blip3.evaluation.golden import checksums
from support import ROOT, load_model

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
TRAINERS = [name for name in SCRIPTS if name != "stripes.py"]
DOCS = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
FEW_STEPS = {
    "finetune_lora.py": ["--steps", "2", "--batch-size", "2"],
    "finetune_trl_sft.py": ["--steps", "2", "--batch-size", "2", "--lora"],
    "preference_dpo.py": ["--steps", "2", "--batch-size", "2"],
    "reward_grpo.py": ["--steps", "2", "--batch-size", "4", "--generations", "4"],
}


def import_script(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stripes = import_script("stripes")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 images to train on, 20 to test on, and 4 for runs that only need some."""
    folder = tmp_path_factory.mktemp("stripes")
    stripes.write(folder / "train", 40, first_seed=1_000)
    stripes.write(folder / "test", 20, first_seed=9_000)
    stripes.write(folder / "few", 4, first_seed=9_000)
    return folder


@pytest.fixture
def run(data, tmp_path, monkeypatch, capsys):
    """Run a script from the repository's root and give its output folder and what it printed."""

    def run(name: str, *arguments: str, test: str = "test") -> tuple[Path, str]:
        file = "pairs.jsonl" if name == "preference_dpo.py" else "data.jsonl"
        splits = ["--train", str(data / "train" / file), "--test", str(data / test / file)]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *splits, "--output", str(tmp_path / "run"), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path / "run", capsys.readouterr().out

    return run


def scores(printed: str) -> list[int]:
    """Right answers before and after, and whatever is in between."""
    return [
        int(number) for number in re.findall(r"^(?:before|with|after).*: (\d+) of \d+ right$", printed, re.MULTILINE)
    ]


def test_lines_of_data_end_at_line_feeds_alone_and_may_be_blank(tmp_path):
    """A question may hold any other character that ends a line for Python, and editors leave a blank last line."""
    row = {"image": "a.png", "question": "One line\u2028or\x85two?", "answer": "2", "rejected": "1"}
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(row, ensure_ascii=False)}\n\n", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in TRAINERS:
        script = import_script(name.removesuffix(".py"))
        rows = script.read_rows(path) if hasattr(script, "read_rows") else script.read_data(path)
        assert len(rows) == 1, name
        assert row["question"] in json.dumps(rows[0], ensure_ascii=False, default=str), name


# -- The task ---------------------------------------------------------------------------------------------------------


def count_runs(image: Image.Image) -> int:
    """Count the runs of ink in the middle row of an image."""
    row = np.asarray(image)[image.height // 2].astype(int)
    is_ink = np.abs(row - np.asarray(image)[0, 0].astype(int)).sum(-1) > 100
    return int((np.diff(is_ink.astype(int), prepend=0) == 1).sum())


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_image_has_as_many_stripes_as_its_answer_says(data, split):
    rows = [json.loads(line) for line in (data / split / "data.jsonl").read_text().splitlines()]
    for row in rows:
        assert count_runs(Image.open(data / split / row["image"])) == int(row["answer"])
    assert {row["answer"] for row in rows} == set("123456")


def test_a_rejected_answer_is_wrong_and_every_wrong_one_occurs(data):
    rows = [json.loads(line) for line in (data / "train" / "pairs.jsonl").read_text().splitlines()]
    pairs = {(row["answer"], row["rejected"]) for row in rows}
    assert all(right != wrong for right, wrong in pairs)
    assert len(pairs) == 30


def test_no_image_is_in_both_splits(data):
    train, test = ({path.read_bytes() for path in (data / name / "images").iterdir()} for name in ("train", "test"))
    assert (len(train), len(test)) == (40, 20)
    assert not train & test


# -- The scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_copied_as_it_is(name):
    allowed = {"torch", "transformers", "datasets", "peft", "trl", "numpy", "PIL"} | set(sys.stdlib_module_names)
    tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {alias.name for node in imports for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    assert {module.split(".")[0] for module in modules} <= allowed


@pytest.mark.slow  # `make examples` runs it too
def test_lora_learns_to_count_stripes(run):
    output, printed = run("finetune_lora.py")
    before, with_adapter, after = scores(printed)
    assert before <= 10
    assert after >= 17
    assert after == with_adapter
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_few_steps_change_the_language_model_and_not_the_tower(run, name):
    output, printed = run(name, *FEW_STEPS[name], test="few")
    assert len(scores(printed)) >= 2
    folder = output / ("merged" if name == "finetune_lora.py" else "final")
    assert not (folder / "adapter_config.json").exists()
    trained = load_model(folder).state_dict()
    untrained = load_model(ROOT).state_dict()
    assert trained.keys() == untrained.keys()
    changed = {name for name, weight in trained.items() if not torch.equal(weight, untrained[name])}
    assert any(".language_model." in name for name in changed)
    assert not any(".vision_tower." in name for name in changed)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def test_all_weights_are_trained_without_an_adapter(run):
    output, _ = run("finetune_trl_sft.py", "--steps", "2", "--batch-size", "2", test="few")
    trained, untrained = load_model(output / "final").state_dict(), load_model(ROOT).state_dict()
    changed = {name.split(".")[1] for name, weight in trained.items() if not torch.equal(weight, untrained[name])}
    assert {"vision_tower", "resampler", "language_model"} <= changed


def test_every_form_of_data_gives_the_same_batch(data, tmp_path):
    lora = import_script("finetune_lora")
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    rows = [json.loads(line) for line in (data / "few" / "data.jsonl").read_text().splitlines()]
    as_messages = [
        {
            "images": [str(data / "few" / row["image"])],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
                {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
            ],
        }
        for row in rows
    ]
    (tmp_path / "messages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_messages))
    collate = lora.make_collator(processor)
    expected = collate(lora.read_rows(data / "few" / "data.jsonl"))
    assert processor.batch_decode([row[row != -100] for row in expected["labels"]]) == [
        f"{row['answer']}<|end|>" for row in rows
    ]
    for path in (data / "few", tmp_path / "messages.jsonl"):
        batch = collate(lora.read_rows(path))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_the_reward_is_highest_for_the_right_number():
    reward = import_script("reward_grpo").right_number
    said = ["3", "4", "5", " 3 ", "three", "", "33"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    rewards = reward(completions, ["3"] * len(said))
    assert rewards[:4] == [1.0, 0.5, 0.25, 1.0]
    assert rewards[4:6] == [0.0, 0.0]
    assert rewards[6] < 1e-6


def test_qlora_says_what_to_install(run, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit, match=r"bitsandbytes.*pip install"):
        run("finetune_lora.py", "--qlora", test="few")


def test_qlora_trains_4_bit_weights_and_merges_into_full_ones(run):
    pytest.importorskip("bitsandbytes", reason="pip install -e .[quantize]")
    output, printed = run("finetune_lora.py", "--qlora", "--steps", "30")
    before, with_adapter, after = scores(printed)
    assert min(with_adapter, after) > before
    merged = AutoModelForImageTextToText.from_pretrained(output / "merged", trust_remote_code=True)
    assert all(parameter.is_floating_point() for parameter in merged.parameters())
    assert not hasattr(merged.config, "quantization_config")


# -- The notebook -----------------------------------------------------------------------------------------------------


def outputs_of(notebook: dict) -> str:
    """All text of a notebook's outputs."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    texts = [output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join("".join(text) for text in texts)


def right_at_the_end(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^(?:before|after): +(\d+) of 20 right", text, flags=re.MULTILINE)]


@pytest.mark.slow  # `make examples` runs it too
def test_the_notebook_runs_and_the_model_learns(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install -e .[examples]")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e .[examples]")
    pytest.importorskip("ipykernel", reason="pip install -e .[examples]")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}})
    client.execute()
    text = outputs_of(notebook)
    before, _, after = right_at_the_end(text)
    assert before <= 10
    assert after >= 17
    assert '{"colour": "grey", "thing": "umbrella", "count": 5}' in text


def test_the_notebook_is_kept_with_small_outputs_and_no_path_of_a_machine():
    content = (EXAMPLES / "tour.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(content)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    assert right_at_the_end(outputs_of(notebook))[-1] >= 17
    assert "site-packages" not in content
    assert not [output for cell in code for output in cell["outputs"] if output.get("name") == "stderr"]
    assert len(content) < 300_000


# -- The documentation ------------------------------------------------------------------------------------------------


def test_the_documentation_and_make_name_every_example():
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"^\| `([\w.]+)` \|", DOCS, flags=re.MULTILINE)) == names
    target = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nexamples: ")[1].split("\n\n")[0]
    assert all(name.split(".")[0] in target for name in names)


def test_the_figures_say_of_which_weights_they_are():
    """Golden tensors do so too: whoever ships other weights has to measure again, or to say that nobody did."""
    (measured,) = re.findall(r"<!-- measured on weights (\w+):", DOCS)
    shipped = hashlib.sha256("".join(checksums(ROOT).values()).encode()).hexdigest()[:12]
    is_said = "weights were those that shipped until" in DOCS
    assert is_said == (measured != shipped), f"the table is of the weights {measured}, the root has {shipped}"


def test_the_notebook_prints_what_the_documentation_says_of_it():
    """So whoever measures the examples again keeps the notebook of that run."""
    (row,) = re.findall(r"^\| `tour\.ipynb`,.*\| (\d+) of 20 \| (\d+) of 20 \|", DOCS, flags=re.MULTILINE)
    printed = right_at_the_end(outputs_of(json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))))
    assert [printed[0], printed[-1]] == [int(number) for number in row]


@pytest.mark.parametrize("name", TRAINERS)
def test_the_documentation_and_the_help_have_the_defaults(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    usage = capsys.readouterr().out.split("\noptions:")[1]
    texts = {text.split()[0]: " ".join(text.split()) for text in re.split(r"\n  --", usage)[1:]}
    options = {name: re.findall(r"\(default: ([^)]*)\)", text)[0] for name, text in texts.items()}
    row = next(line for line in DOCS.splitlines() if line.startswith(f"| `python examples/{name}`"))
    steps, size = re.findall(r"\| (\d+) x (\d+) ", row)[0]
    assert (options["steps"], options["batch-size"]) == (steps, size)
    assert re.search(rf"\b{steps}(?: steps)? in\s`{name}`", DOCS)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_documented_options_exist(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    usage = capsys.readouterr().out
    commands = re.findall(rf"^ *python examples/{name}(.*)$", DOCS + (EXAMPLES / name).read_text(), flags=re.MULTILINE)
    options = {option for command in commands for option in re.findall(r"--[a-z-]+", command)}
    assert commands
    assert options <= set(re.findall(r"--[a-z-]+", usage))
