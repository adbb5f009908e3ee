# SPDX-License-Identifier: Apache-2.0
"""Whole runs with adapters: next token and preference, resumed, merged, quantized, on two processes."""

import importlib.util
import json
import signal
import textwrap
from pathlib import Path
from zlib import crc32

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor

from blip3.answering import Answer
from blip3.data.records import Record, Turn, write_jsonl
from blip3.training import train as stage
from blip3.training.lora import loading_options, stored_dtype
from blip3.training.noised_answers import NoisedAnswers, pairs_of, write
from blip3.training.recipe import LoraSettings
from support import convert, load_model, render_image
from support.conversion import tensors_of
from support.processes import expect_success, start
from support.training import losses_of, newest_checkpoint, tiny_recipe, weights_in, write_conversations, write_recipe

LORA = {"trainable": ["language_model"], "lora": {"rank": 2, "alpha": 4, "dropout": 0.1}}
PREFERENCE = LORA | {"loss": "preference", "max_steps": 6}


@pytest.fixture(scope="module")
def text_pairs(tmp_path_factory) -> str:
    """A file of pairs without images, so that some batches have none."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    records = [
        Record(f"t{n}", "preference", (), (Turn("user", f"What follows {n}?"),), f"It is {n + 1}.", f"It is {n}.")
        for n in range(8)
    ]
    write_jsonl(records, path)
    return str(path)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """A file of conversations without images."""
    return write_conversations(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def pairs(text_pairs) -> list[dict]:
    return [{"rendered": "preference", "weight": 2}, {"records": text_pairs, "weight": 1}]


@pytest.fixture(scope="module")
def noised(small_model, pairs, tmp_path_factory) -> str:
    """A file of answers to noised images; an untrained model writes no sentences, so a stand-in answers."""
    folder = tmp_path_factory.mktemp("noised")
    recipe = tiny_recipe(folder / "run.yaml", small_model, **PREFERENCE, mixture=pairs, noised_weight=1.0,
                         noised_answers=str(folder / "noised.parquet"))  # fmt: skip
    write(Spoken(recipe), pairs_of(recipe, 24), recipe)
    return recipe.noised_answers


class Spoken(NoisedAnswers):
    """Answers in the model's place: a sentence, for every third pair the chosen answer itself."""

    def __init__(self, recipe):
        super().__init__(None, recipe, batch_size=4, max_new_tokens=8)
        self.num_asked = 0

    def answer(self, records, step):
        self.num_asked += len(records)
        texts = [
            record.chosen if crc32(record.id.encode()) % 3 == 0 else f"I see {len(record.id)} things."
            for record in records
        ]
        return [Answer(text, 1, 1, True) for text in texts]


@pytest.fixture(scope="module")
def straight(small_model, pairs, noised, tmp_path_factory) -> Path:
    """The folder of a preference run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = tiny_recipe(folder / "run.yaml", small_model, **PREFERENCE, mixture=pairs, noised_weight=1.0,
                         noised_answers=noised)  # fmt: skip
    assert stage.train(recipe) == folder / "run" / "final"
    return folder / "run"


def history_of(output: Path) -> list[dict]:
    history = json.loads((newest_checkpoint(output) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def test_a_preference_run_logs_the_usual_curves(straight):
    history = history_of(straight)
    assert len(history) == 6
    for entry in history:
        assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], abs=1e-5)
        assert 0 <= entry["rewards/accuracies"] <= 1
        assert entry["logps/chosen"] < 0
        assert 0 <= entry["noised/share"] <= 1
    assert any(0 < entry["noised/share"] < 1 for entry in history), "some pairs have a noised answer, some have none"
    assert history[0]["rewards/margins"] == history[0]["noised/margins"] == 0
    # Pairs differ from step to step, and with them the sign of their margins; the noised answers are nearly the same.
    assert history[-1]["noised/margins"] > 0


@pytest.fixture(scope="module")
def tuned(small_model, tmp_path_factory) -> Path:
    """The folder of a run that fine-tuned adapters on next tokens."""
    folder = tmp_path_factory.mktemp("tuned")
    return stage.train(tiny_recipe(folder / "run.yaml", small_model, **LORA)).parent


def changed_names(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("run", ["straight", "tuned"])
def test_the_merged_folder_gives_what_the_adapters_give(small_model, run, request):
    output = request.getfixturevalue(run)
    assert sorted(path.name for path in (output / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]
    assert not list((output / "final").glob("adapter*"))
    adapted = PeftModel.from_pretrained(load_model(small_model), str(output / "adapter")).eval()
    merged = load_model(output / "final").eval()
    processor = AutoProcessor.from_pretrained(output / "final", trust_remote_code=True)
    inputs = processor(text="<image>\nWhat is it?", images=render_image(60, 96), return_tensors="pt")
    with torch.no_grad():
        expected, found = adapted(**inputs).logits, merged(**inputs).logits
        untrained = load_model(small_model).eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - untrained).abs().max() > 1e-3, "training must change the logits, or the rest shows nothing"
    changed = changed_names(weights_in(small_model), weights_in(output / "final"))
    assert changed
    assert all(name.startswith("model.language_model.layers.") for name in changed), "neither lm_head nor vision"
    assert (output / "final" / "recipe.yaml").is_file()


def test_the_merged_folder_converts_back_to_the_release_names(straight, small_model, tmp_path):
    for name, folder in (("before", small_model), ("after", straight / "final")):
        convert(folder, tmp_path / name, "--to-original")
    assert tensors_of(tmp_path / "after").keys() == tensors_of(tmp_path / "before").keys()


def test_weights_are_merged_in_float32_and_rounded_to_the_type_they_had(small_model, tmp_path):
    source = tmp_path / "half"
    for path in small_model.iterdir():
        if path.is_file():
            (tmp_path / "half").mkdir(exist_ok=True)
            (source / path.name).write_bytes(path.read_bytes())
    load_model(small_model).to(torch.bfloat16).save_pretrained(source)
    assert stored_dtype(source) is torch.bfloat16
    final = stage.train(tiny_recipe(tmp_path / "run.yaml", source, **LORA, max_steps=2))
    before, after = weights_in(source), weights_in(final)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = changed_names(before, after)
    assert changed
    adapter = load_file(final.parent / "adapter" / "adapter_model.safetensors")
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        delta = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"] * 2  # alpha / rank
        assert torch.equal(after[name], (before[name].float() + delta).bfloat16()), name


# -- interruptions ----------------------------------------------------------------------------------------------------


has_4_bits = importlib.util.find_spec("bitsandbytes") is not None
needs_4_bits = pytest.mark.skipif(not has_4_bits, reason="bitsandbytes is not installed")
IN_4_BITS = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.1, "quantize": "4bit"}}


@pytest.mark.parametrize(
    "form", ["next token", "generated", "teacher-forced", *(
        pytest.param(form, marks=needs_4_bits) for form in ("next token, 4 bits", "generated, 4 bits")
    )]
)  # fmt: skip
def test_a_run_resumes_bit_equal(small_model, pairs, noised, tmp_path, form):
    form, _, in_4_bits = form.partition(", ")
    changes = {"next token": LORA | {"max_steps": 6},
               "generated": PREFERENCE | {"mixture": pairs, "noised_weight": 1.0, "noised_answers": noised},
               "teacher-forced": PREFERENCE | {"mixture": pairs, "noised_weight": 0.5, "anchor": 0.1},
               }[form]  # fmt: skip
    changes |= IN_4_BITS if in_4_bits else {}
    for name in ("whole", "half"):
        stage.train(tiny_recipe(tmp_path / f"{name}.yaml", small_model, **changes))
    for path in sorted((tmp_path / "half" / "checkpoint-6").iterdir()):
        path.unlink()
    stage.train(tiny_recipe(tmp_path / "half.yaml", small_model, **changes))
    assert losses_of(tmp_path / "half") == losses_of(tmp_path / "whole")
    for folder in ("adapter/adapter_model", "final/model"):
        resumed, expected = (load_file(tmp_path / name / f"{folder}.safetensors") for name in ("half", "whole"))
        assert not changed_names(resumed, expected)


# -- switches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 1, "accumulation": 4}, {"gradient_checkpointing": True}, {"num_workers": 1}],
    ids=str,
)
def test_the_same_pairs_give_the_same_losses(small_model, pairs, noised, tmp_path, settings):
    common = PREFERENCE | {"lora": {"rank": 2, "alpha": 4}, "mixture": pairs, "noised_weight": 1.0}
    common |= {"noised_answers": noised}
    for name, changes in (("one", {}), ("other", settings)):
        stage.train(tiny_recipe(tmp_path / f"{name}.yaml", small_model, **common, **changes))
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-4)
    figures = [
        [entry[name] for entry in history_of(tmp_path / run) for name in ("rewards/chosen", "noised/share")]
        for run in ("one", "other")
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


def test_mixed_precision_keeps_frozen_weights_in_half_the_memory(small_model, pairs, tmp_path):
    assert loading_options(LoraSettings(2, 4), bf16=True, fsdp=False) == (torch.bfloat16, {})
    assert loading_options(LoraSettings(2, 4), bf16=True, fsdp=True) == (torch.float32, {})
    assert loading_options(None, bf16=True, fsdp=False) == (torch.float32, {})
    common = PREFERENCE | {"mixture": pairs, "lora": {"rank": 2, "alpha": 4}}
    stage.train(tiny_recipe(tmp_path / "one.yaml", small_model, **common))
    stage.train(tiny_recipe(tmp_path / "other.yaml", small_model, **common, bf16=True))
    finals = [weights_in(tmp_path / name / "final") for name in ("one", "other")]
    assert changed_names(*finals), "the losses of so short a run may be alike in all digits that are logged"
    assert losses_of(tmp_path / "other") == pytest.approx(losses_of(tmp_path / "one"), abs=0.05)
    assert {tensor.dtype for tensor in weights_in(tmp_path / "other" / "final").values()} == {torch.float32}
    changed = changed_names(weights_in(small_model), weights_in(tmp_path / "other" / "final"))
    assert all(".language_model." in name for name in changed), "what is frozen was not rounded on the way"


@needs_4_bits
@pytest.mark.parametrize("loss", ["next_token", "preference"])
def test_adapters_learn_on_weights_of_4_bits(small_model, tmp_path, loss):
    changes = LORA if loss == "next_token" else PREFERENCE | {"mixture": [{"rendered": "preference"}]}
    lora = {"rank": 2, "alpha": 4, "quantize": "4bit"}
    final = stage.train(tiny_recipe(tmp_path / "run.yaml", small_model, **(changes | {"lora": lora})))
    assert {tensor.dtype for tensor in weights_in(final).values()} == {torch.float32}
    changed = changed_names(weights_in(small_model), weights_in(final))
    assert changed
    assert all(".language_model." in name for name in changed), "the adapters are added to the weights of before"


@pytest.mark.skipif(has_4_bits, reason="bitsandbytes is installed")
def test_4_bits_without_bitsandbytes_names_what_to_install():
    with pytest.raises(ImportError, match=r"'4bit', which needs the package bitsandbytes.*pip install"):
        loading_options(LoraSettings(2, 4, quantize="4bit"), bf16=False, fsdp=False)


# -- other processes --------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from torch.distributed.tensor import DTensor
    from blip3.training import train

    killed_at, real_step, kinds = int(sys.argv.pop(1)), train.StageTrainer.training_step, []

    def training_step(self, model, inputs, *arguments, **options):
        if self.state.global_step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        kinds.append("pixel_values" in inputs)
        if self.recipe.fsdp:
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "every weight is sharded"
        return real_step(self, model, inputs, *arguments, **options)

    train.StageTrainer.training_step = training_step
    train.main()
    assert not torch.distributed.is_initialized(), "its threads would outlive Python"
    shown = Path(__file__).with_name(f"kinds-{os.environ.get('RANK', '0')}")
    shown.write_text("".join("it"[not each] for each in kinds))
"""


def launch(path: Path, *launcher: str | int, killed_at: int = -1):
    """Train a recipe in processes of its own, which die before a step if they are told to."""
    script = path.with_name("script.py")
    script.write_text(textwrap.dedent(SCRIPT))
    return start(*launcher, script, killed_at, path, modules=path.parent / "modules")


@pytest.mark.parametrize("form", ["next token", "preference"])
def test_a_killed_run_resumes_bit_equal(straight, tuned, small_model, pairs, noised, tmp_path, form):
    changes = LORA if form == "next token" else PREFERENCE | {"mixture": pairs, "noised_weight": 1.0}
    changes |= {} if form == "next token" else {"noised_answers": noised}
    path = write_recipe(tmp_path / "run.yaml", small_model, **changes)
    process = launch(path, killed_at=4)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == -signal.SIGKILL, output[-4000:]
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-3"
    expect_success(launch(path))
    expected = tuned if form == "next token" else straight
    assert losses_of(tmp_path / "run") == losses_of(expected)
    for file in ("adapter/adapter_model.safetensors", "final/model.safetensors"):
        assert not changed_names(load_file(tmp_path / "run" / file), load_file(expected / file))


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def changes_of(form: str, pairs: list[dict], noised: str, texts: str) -> dict:
    """What a recipe of each form says, without dropout, which processes would share out otherwise."""
    if form == "next token":  # as the safety stage
        return LORA | {
            "lora": {"rank": 2, "alpha": 4},
            "mixture": [{"rendered": "name"}, {"rendered": "compare"}, {"records": texts, "weight": 2}],
        }
    changes = PREFERENCE | {"lora": {"rank": 2, "alpha": 4}, "mixture": pairs, "noised_weight": 1.0}
    return changes | ({"noised_answers": noised} if form == "generated" else {})


@pytest.mark.parametrize(
    ("form", "sharding"),
    [
        pytest.param("next token", {}, id="next token, DDP"),
        pytest.param("generated", {}, id="generated, DDP"),
        pytest.param("teacher-forced", {"fsdp": True}, id="teacher-forced, FSDP2"),
        pytest.param("generated", {"deepspeed": "zero2"}, id="generated, ZeRO-2", marks=needs_deepspeed),
    ],
)
def test_two_processes_train_as_one_where_one_may_have_text_alone(
    small_model, pairs, noised, texts, tmp_path, sharding, form
):
    common = changes_of(form, pairs, noised, texts)
    stage.train(tiny_recipe(tmp_path / "one.yaml", small_model, **common, batch_size=2))
    path = write_recipe(tmp_path / "two.yaml", small_model, **common, batch_size=1, **sharding)
    expect_success(launch(path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2))
    kinds = [(tmp_path / f"kinds-{rank}").read_text() for rank in (0, 1)]
    assert any(one != other for one, other in zip(*kinds, strict=True)), f"a step with text on one side: {kinds}"
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-4)
    names = () if form == "next token" else ("rewards/margins", "noised/share", "noised/margins")
    one, two = ([[entry[name] for name in names] for entry in history_of(tmp_path / run)] for run in ("one", "two"))
    assert torch.tensor(two) == pytest.approx(torch.tensor(one), abs=1e-3)
    expected, found = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("one", "two"))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().mean() < 1e-4, name
    load_model(tmp_path / "two" / "final")
