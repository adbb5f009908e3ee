# SPDX-License-Identifier: Apache-2.0
"""The engines people train and serve with: Auto classes, pipeline, Trainer, PEFT, TRL, FSDP2, accelerate."""

import copy
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoProcessor, Trainer, TrainingArguments, pipeline

from support import IS_TRANSFORMERS_5, TRL_ARGUMENTS, load_model, render_image

PROMPT = "<|user|>\n{}<|end|>\n<|assistant|>\n"
IMAGES = [render_image(150, 150, seed=1), render_image(60, 300, seed=2), render_image(200, 90, seed=3)]
ROWS = [
    {"text": PROMPT.format("<image>\nWhat is in the image?") + "A red square.<|end|>\n", "images": IMAGES[:1]},
    {"text": PROMPT.format("How many dogs are there?") + "Two.<|end|>\n", "images": []},
    {"text": PROMPT.format("Is <image> above <image>?") + "A blue circle is.<|end|>\n", "images": IMAGES[1:]},
    {"text": PROMPT.format("Read the number, please.") + "It is nine.<|end|>\n", "images": []},
]
TEXT_ROWS = [row for row in ROWS if not row["images"]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Fail a test that asks for another machine, even if it survives the refusal."""
    attempts = []

    def refuse(*arguments: object, **_: object) -> None:
        attempts.append(arguments)
        raise OSError("tests may not use the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert attempts == []


@pytest.fixture(scope="module")
def collate(processor):
    """Rows to a training batch, as a user's collator would."""

    def collate(rows: list[dict], **options: str) -> dict:
        texts, images = [row["text"] for row in rows], [row["images"] for row in rows]
        options = {"padding": True, "return_labels": True, "return_tensors": "pt", **options}
        return dict(processor(text=texts, images=images, **options))

    return collate


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """Logits of the real tokens in evaluation mode."""
    was_training = model.training
    logits = model.eval()(**batch).logits
    model.train(was_training)
    return logits[batch["attention_mask"].bool()]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(ours: dict, theirs: dict, tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = (tensor - theirs[name]).abs().max().item()
        assert difference <= tolerance, name


# -- Auto classes -----------------------------------------------------------------------------------------------------

MODEL_CLASSES = {
    "AutoModel": "Blip3Model",
    "AutoModelForImageTextToText": "Blip3ForConditionalGeneration",
    "AutoModelForMultimodalLM" if IS_TRANSFORMERS_5 else "AutoModelForVision2Seq": "Blip3ForConditionalGeneration",
}
OTHER_CLASSES = {
    "AutoConfig": "Blip3Config",
    "AutoProcessor": "Blip3Processor",
    "AutoImageProcessor": "Blip3ImageProcessor",
}


@pytest.mark.parametrize(("auto_class", "expected"), (MODEL_CLASSES | OTHER_CLASSES).items())
def test_auto_class_loads_the_folder(tiny_repo, auto_class, expected):
    loaded = getattr(transformers, auto_class).from_pretrained(tiny_repo, trust_remote_code=True)
    assert type(loaded).__name__ == expected
    assert type(loaded).__module__.startswith("transformers_modules.")


@pytest.mark.parametrize("auto_class", MODEL_CLASSES)
def test_auto_class_loads_every_weight_and_no_other(tiny_repo, tiny_model, auto_class):
    model, info = getattr(transformers, auto_class).from_pretrained(
        tiny_repo, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    base = tiny_model.model if auto_class == "AutoModel" else tiny_model
    assert_same_weights(weights_of(model), weights_of(base))


# -- pipeline ---------------------------------------------------------------------------------------------------------

NEW_TOKENS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def user(*content) -> list[dict]:
    parts = [
        {"type": "text", "text": each} if isinstance(each, str) else {"type": "image", "image": each}
        for each in content
    ]
    return [{"role": "user", "content": parts}]


CHATS = [
    user(IMAGES[0], "What is in the image?"),
    user("Is ", IMAGES[1], " above ", IMAGES[2], "?"),
    user(IMAGES[2], "Read the number, please."),
]


@pytest.fixture(scope="module")
def pipe(tiny_repo):
    return pipeline(
        "image-text-to-text", model=str(tiny_repo), trust_remote_code=True, device="cpu", dtype=torch.float32
    )


def answers(model, processor, inputs) -> list[str]:
    """Decode what the model itself generates; a decoder may drop a leading space, so the prompt goes along."""
    ids = model.generate(**inputs, **NEW_TOKENS)
    texts, prompts = (processor.batch_decode(each, skip_special_tokens=True) for each in (ids, inputs["input_ids"]))
    return [text.removeprefix(prompt) for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize(
    ("chats", "batch_size"),
    [([*CHATS, user("How many dogs are there?")], 1), (CHATS, 2)],
    ids=["one by one", "in batches of two"],
)
def test_pipeline_answers_chats_as_the_model_does(pipe, tiny_model, processor, chats, batch_size):
    outputs = pipe(text=copy.deepcopy(chats), batch_size=batch_size, generate_kwargs=NEW_TOKENS)
    # a batch of one conversation comes back bare, several as one list each
    turns = [(output[0] if isinstance(output, list) else output)["generated_text"][-1] for output in outputs]
    expected = []
    for chat in chats:
        inputs = processor.apply_chat_template(
            [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected += answers(tiny_model, processor, inputs)
    assert [turn["role"] for turn in turns] == ["assistant"] * len(chats)
    assert [turn["content"] for turn in turns] == expected
    assert len(set(expected)) == len(chats), "answers must differ, or the test shows nothing"


def test_pipeline_answers_raw_prompts_as_the_model_does(pipe, tiny_model, processor):
    texts = [PROMPT.format("<image>\nWhat is in the image?"), PROMPT.format("Is <image> above <image>?")]
    images = [IMAGES[:1], IMAGES[1:]]
    expected = answers(tiny_model, processor, processor(text=texts, images=images, padding=True, return_tensors="pt"))
    outputs = pipe(images=images, text=texts, batch_size=2, return_full_text=False, generate_kwargs=NEW_TOKENS)
    assert [output["generated_text"] for output in outputs] == expected
    alone = pipe(images=images[1], text=texts[1], return_full_text=False, generate_kwargs=NEW_TOKENS)
    assert alone[0]["generated_text"] == expected[1]
    assert expected[0] != expected[1], "answers must differ, or the test shows nothing"


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor | None]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("rows", [ROWS, TEXT_ROWS], ids=["mixed", "text only"])
@pytest.mark.parametrize("freezes_tower", [False, True], ids=["trained tower", "frozen tower"])
def test_gradients_with_and_without_checkpointing_are_equal(model, collate, rows, freezes_tower):
    model.model.vision_tower.requires_grad_(not freezes_tower)
    batch = collate(rows)
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    runs = []
    for layer in model.model.language_model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    checkpointed = gradients(model, batch)
    assert len(runs) == 2 * model.config.text_config.num_hidden_layers, "nothing was computed again"
    assert_same_weights(checkpointed, plain, tolerance=1e-6)


@pytest.mark.parametrize("freezes_tower", [False, True], ids=["trained tower", "frozen tower"])
def test_a_text_only_step_gives_every_trainable_parameter_a_gradient(model, collate, freezes_tower):
    batch = collate(TEXT_ROWS)
    expected_loss = model.eval()(**batch).loss.item()
    model.model.vision_tower.requires_grad_(not freezes_tower)
    found = gradients(model, batch)
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert any(name.startswith("model.vision_tower.") for name in found) != freezes_tower
    for name, gradient in found.items():
        is_vision = name.startswith(("model.vision_tower.", "model.resampler."))
        assert gradient.isfinite().all()
        assert gradient.any() != is_vision, name
    assert model(**batch).loss.item() == pytest.approx(expected_loss, abs=1e-6)


# -- Trainer ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def build_trainer(collate, own_processor, tmp_path):
    def build(model: torch.nn.Module, **kwargs) -> Trainer:
        arguments = TrainingArguments(
            output_dir=tmp_path / "run",
            max_steps=2,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=1,
            remove_unused_columns=False,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            **kwargs,
        )
        return Trainer(
            model,
            arguments,
            train_dataset=ROWS,
            eval_dataset=ROWS,
            data_collator=collate,
            processing_class=own_processor,
        )

    return build


def test_trainer_learns_evaluates_saves_and_resumes(model, build_trainer, tiny_repo, collate, tmp_path):
    trainer = build_trainer(model)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    prediction = trainer.predict(ROWS)
    batch = collate(ROWS)
    assert prediction.predictions.shape == (*batch["input_ids"].shape, model.config.text_config.vocab_size)

    checkpoint = tmp_path / "run" / "checkpoint-2"
    reloaded = load_model(checkpoint)
    assert_same_weights(weights_of(reloaded), weights_of(model))
    restored = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    ids = restored(text=[ROWS[0]["text"]], images=[ROWS[0]["images"]])["input_ids"][0]
    assert ids == collate(ROWS[:1])["input_ids"][0].tolist()

    resumed = build_trainer(load_model(tiny_repo))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.state.global_step == 2
    assert_same_weights(weights_of(resumed.model), weights_of(model), tolerance=1e-6)


# -- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repo", "names"),
    [
        ("tiny_repo", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
        ("unfused_repo", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
    ids=["fused", "unfused"],
)
def test_lora_on_the_language_model_trains_saves_loads_and_merges(request, collate, tmp_path, repo, names):
    folder, batch = request.getfixturevalue(repo), collate(ROWS)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=rf".*\.language_model\..*\.({'|'.join(names)})")
    base = load_model(folder)
    untrained = logits_of(base, batch)
    model = get_peft_model(base, config)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    num_layers = base.config.text_config.num_hidden_layers
    assert len(trainable) == 2 * num_layers * len(names)
    assert all(".language_model." in name and "lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    gradients(model, batch)
    optimizer.step()
    trained = logits_of(model, batch)
    assert (trained - untrained).abs().max() > 1e-2, "training must change the logits, or the rest shows nothing"

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(loaded, batch), trained, rtol=0, atol=0)
    merged = loaded.merge_and_unload()
    assert type(merged).__name__ == "Blip3ForConditionalGeneration"
    torch.testing.assert_close(logits_of(merged, batch), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits_of(load_model(tmp_path / "merged"), batch), logits_of(merged, batch), rtol=0, atol=0
    )


# -- TRL --------------------------------------------------------------------------------------------------------------


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def preference_rows(*columns: str) -> datasets.Dataset:
    rows = [
        {
            "images": images,
            "prompt": turn("user", "What is in the image?"),
            "completion": turn("assistant", answer),
            "chosen": turn("assistant", answer),
            "rejected": turn("assistant", "I do not know."),
        }
        for images, answer in ((IMAGES[:1], "A red square."), (IMAGES[1:], "Two dogs and a sign."))
    ]
    return datasets.Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def test_trl_supervised_step_is_the_models_own_loss(model, own_processor, tiny_repo, tmp_path):
    trl = pytest.importorskip("trl")
    before = weights_of(model)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=tmp_path, **TRL_ARGUMENTS, max_length=None),
        train_dataset=preference_rows("images", "prompt", "completion"),
        processing_class=own_processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["image_sizes"].shape == (3, 2)
    is_trained = batch["labels"] != -100
    assert is_trained.any(1).all()
    assert not (is_trained & (batch["input_ids"] == model.config.image_token_id)).any()
    expected = load_model(tiny_repo)(**batch).loss.item()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(expected, rel=1e-3)]
    assert changed_parts(before, weights_of(model)) == {"lm_head", "language_model", "resampler", "vision_tower"}


def test_trl_preference_step_starts_from_an_equal_reference(model, own_processor, tmp_path):
    trl = pytest.importorskip("trl")
    before = weights_of(model)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=tmp_path, **TRL_ARGUMENTS, max_length=None),
        train_dataset=preference_rows("images", "prompt", "chosen", "rejected"),
        processing_class=own_processor,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == [pytest.approx(math.log(2), abs=1e-3)]  # before the first update both models agree
    assert changed_parts(before, weights_of(model)) == {"lm_head", "language_model", "resampler", "vision_tower"}


def changed_parts(before: dict, after: dict) -> set[str]:
    """Name the parts of the model that training changed."""
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return {name.removeprefix("model.").split(".")[0] for name in changed}


# -- saving -----------------------------------------------------------------------------------------------------------


def run_python(script: str, *arguments: object, modules: Path, cwd: Path) -> subprocess.Popen:
    """Start a script in an interpreter of its own, with an empty cache of remote code and one thread, as here."""
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def expect_success(*processes: subprocess.Popen) -> None:
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)


LOAD_ELSEWHERE = """
    import importlib.abc, json, sys

    class RefusesThisRepository(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "blip3":
                raise ImportError(f"{name} is this repository's package; saved folders must do without it")

    sys.meta_path.insert(0, RefusesThisRepository())
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model_folder, processor_folder, results, rows = sys.argv[1:]
    processor = AutoProcessor.from_pretrained(processor_folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(model_folder, trust_remote_code=True).eval()
    rows = torch.load(rows, weights_only=False)
    texts, images = [row["text"] for row in rows], [row["images"] for row in rows]
    inputs = processor(text=texts, images=images, padding=True, return_labels=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    assert not any(name.split(".")[0] == "blip3" for name in sys.modules)
    torch.save({"inputs": dict(inputs), "logits": logits}, results)
"""


def test_saved_folders_stand_alone(tiny_model, own_processor, collate, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    own_processor.save_pretrained(tmp_path / "processor")
    assert (tmp_path / "model" / "modeling_blip3.py").is_file()
    (tmp_path / "empty").mkdir()
    torch.save(ROWS, tmp_path / "rows.pt")
    process = run_python(
        LOAD_ELSEWHERE,
        tmp_path / "model",
        tmp_path / "processor",
        tmp_path / "results.pt",
        tmp_path / "rows.pt",
        modules=tmp_path / "modules",
        cwd=tmp_path / "empty",
    )
    expect_success(process)
    found = torch.load(tmp_path / "results.pt")
    batch = collate(ROWS)
    assert found["inputs"].keys() == batch.keys()
    assert all(torch.equal(found["inputs"][name], batch[name]) for name in batch)
    real = batch["attention_mask"].bool()
    assert torch.equal(found["logits"][real], logits_of(tiny_model, batch))


# -- FSDP2 ------------------------------------------------------------------------------------------------------------

SHARDED_STEPS = """
    import sys
    from datetime import timedelta
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForImageTextToText

    def run(tower):
        model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32).train()
        model.model.vision_tower.requires_grad_(tower == "trained")
        layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        names = {type(layer).__name__ for layer in layers}
        assert {"Blip3ResamplerLayer", "Phi3DecoderLayer", "SiglipEncoderLayer"} <= names, names
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        for batches in torch.load(work / "steps.pt"):
            model(**batches[rank]).loss.backward()
            assert [name for name, parameter in trained.items() if parameter.grad is None] == []
            optimizer.step()
            optimizer.zero_grad()
        assert any(parameter.to_local().numel() < parameter.numel() for parameter in trained.values())
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            torch.save(full, work / f"{tower}.pt")
            model.save_pretrained(work / f"{tower}_tower", state_dict=full)
        dist.barrier()

    rank, work, repo = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    dist.init_process_group(
        "gloo", init_method=f"file://{work}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for tower in ("trained", "frozen"):
        run(tower)
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def sharded_steps(collate) -> list[list[dict]]:
    """One batch per rank and step."""
    as_bytes = collate(ROWS[:2], pixel_dtype="uint8")
    return [
        [as_bytes, collate(ROWS[2:])],
        [collate(ROWS[2:3]), collate(TEXT_ROWS[:1])],  # one rank has no images; both must call the same layers
        [collate(TEXT_ROWS[:1]), collate(TEXT_ROWS[1:])],
    ]


@pytest.fixture(scope="module")
def sharded_run(sharded_steps, tiny_repo, tmp_path_factory) -> Path:
    """The folder that two ranks wrote after training with FSDP2."""
    work = tmp_path_factory.mktemp("sharded")
    torch.save(sharded_steps, work / "steps.pt")
    expect_success(
        *(
            run_python(SHARDED_STEPS, rank, work, tiny_repo, modules=work / f"modules-{rank}", cwd=work)
            for rank in range(2)
        )
    )
    return work


@pytest.mark.parametrize("tower", ["trained", "frozen"])
def test_fsdp2_trains_as_one_process_does(model, sharded_steps, sharded_run, tower):
    model.train().model.vision_tower.requires_grad_(tower == "trained")
    before = weights_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for batches in sharded_steps:
        (sum(model(**batch).loss for batch in batches) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {"lm_head", "language_model", "resampler"} | ({"vision_tower"} if tower == "trained" else set())
    assert changed_parts(before, weights_of(model)) == trained
    assert_same_weights(torch.load(sharded_run / f"{tower}.pt"), weights_of(model), tolerance=1e-4)


def test_a_folder_saved_under_fsdp2_is_complete(sharded_run, tiny_repo):
    saved = sharded_run / "trained_tower"
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (saved, tiny_repo))
    assert config["architectures"] == original["architectures"]
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_blip3.Blip3ForConditionalGeneration"
    assert {value.split(".")[0] for value in config["auto_map"].values()} == {"modeling_blip3", "configuration_blip3"}
    names = {path.name for path in saved.glob("*.py")}
    assert names == {f"{name}_blip3.py" for name in ("configuration", "generation", "modeling", "tiling", "towers")}
    assert_same_weights(weights_of(load_model(saved)), torch.load(sharded_run / "trained.pt"))


# -- accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all in memory", "half on disk"])
def test_placed_models_give_the_same_logits_and_answers(tiny_repo, tiny_model, processor, collate, tmp_path, share):
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tiny_model.state_dict().values())
    limits = {} if share == 1 else {"max_memory": {"cpu": int(share * num_bytes)}}
    placed = load_model(tiny_repo, device_map="auto", offload_folder=tmp_path, **limits).eval()
    on_disk = [name for name, place in getattr(placed, "hf_device_map", {}).items() if place == "disk"]
    assert bool(on_disk) == (share < 1)
    batch = collate(ROWS)
    assert torch.equal(logits_of(placed, batch), logits_of(tiny_model, batch))
    inputs = processor(text=[ROWS[2]["text"]], images=[ROWS[2]["images"]], return_tensors="pt")
    assert answers(placed, processor, inputs) == answers(tiny_model, processor, inputs)
