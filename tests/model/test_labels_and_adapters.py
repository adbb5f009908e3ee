# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients whoever asks for them: Trainer, TRL and PEFT with the settings people use."""

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from support import IS_TRANSFORMERS_5, TRL_ARGUMENTS, load_model, render_image

PROMPT = "<|user|>\n<image>\n{}<|end|>\n<|assistant|>\n{}<|end|>\n"
ROWS = [("What is it?", "A red square."), ("How many dogs?", "Two."), ("Which colour is the sign?", "Blue.")]
IMAGES = [render_image(150, 150, seed=1), render_image(60, 300, seed=2), render_image(200, 90, seed=3)]


def collate(processor):
    """The collator of many tutorials: labels are a copy of the ids without the padding."""

    def collate(rows: list[int]) -> dict:
        texts, images = [PROMPT.format(*ROWS[row]) for row in rows], [[IMAGES[row]] for row in rows]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        batch["labels"] = labels
        return batch

    return collate


@torch.no_grad()
def next_token_loss(model, batch, smoothing: float = 0.0) -> float:
    """Mean loss over the text tokens that are predicted, written out."""
    batch = dict(batch)
    batch.pop("labels", None)
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    targets = batch["input_ids"][:, 1:].flatten()
    counts = (batch["attention_mask"][:, 1:].flatten() == 1) & (targets != model.config.image_token_id)
    return torch.nn.functional.cross_entropy(logits[counts], targets[counts], label_smoothing=smoothing).item()


def training_arguments(folder, **kwargs) -> TrainingArguments:
    options = {"per_device_train_batch_size": 3, "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
    options |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(output_dir=folder, remove_unused_columns=False, **options | kwargs)


def first_loss(trainer) -> float:
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_learns_the_next_token_and_no_image_token(model, own_processor, tmp_path, smoothing):
    batch = collate(own_processor)(range(3))
    assert (batch["labels"] != -100).any(1).all()
    assert not (batch["labels"] == model.config.image_token_id).any()
    expected = next_token_loss(model, batch, smoothing)
    trainer = Trainer(
        model,
        training_arguments(tmp_path, label_smoothing_factor=smoothing),
        data_collator=collate(own_processor),
        train_dataset=[0, 1, 2],
    )
    assert first_loss(trainer) == pytest.approx(expected * counted_share(batch, smoothing), abs=2e-3)


def counted_share(batch, smoothing: float = 0.0) -> float:
    """Of the labels that Trainer divides the loss by, those that are predicted: 4.57 counts each row's first one."""
    if IS_TRANSFORMERS_5 or smoothing:
        return 1.0
    counts = batch["labels"] != -100
    return (counts[:, 1:].sum() / counts.sum()).item()


def test_labels_made_by_others_hold_no_image_tokens_either(model, own_processor, tmp_path):
    """Whoever copies ids by hand gives the model labels that the processor's output never saw."""
    batch = dict(collate(own_processor)(range(3)))
    expected = next_token_loss(model, batch)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert (batch["labels"] == model.config.image_token_id).any()
    assert model(**batch).loss.item() == pytest.approx(expected, abs=1e-5)
    counted = (batch["labels"][:, 1:] != -100).sum()  # what Trainer divides by
    assert model(**batch, num_items_in_batch=counted).loss.item() == pytest.approx(expected, abs=1e-5)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert model(**batch, shift_labels=shifted).loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["torch", "numpy", "list"])
def test_labels_set_on_what_the_processor_gives_hold_no_image_tokens(own_processor, kind):
    tensors = {"torch": "pt", "numpy": "np", "list": None}[kind]
    batch = own_processor(
        text=[PROMPT.format(*ROWS[0])] * 2, images=[[IMAGES[0]]] * 2, return_tensors=tensors, padding=True
    )
    ids = batch["input_ids"]
    batch["labels"] = ids.copy() if kind == "list" else ids
    expected = torch.as_tensor(ids).masked_fill(torch.as_tensor(ids) == own_processor.image_token_id, -100)
    assert type(batch["labels"]) is type(ids)
    assert torch.equal(torch.as_tensor(batch["labels"]), expected)
    assert (torch.as_tensor(batch["input_ids"]) == own_processor.image_token_id).any(), "the ids themselves stay"


def chat_rows() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [
            {
                "images": [image],
                "messages": [
                    {"role": "user", "content": f"{question}"},
                    {"role": "assistant", "content": answer},
                ],
            }
            for image, (question, answer) in zip(IMAGES, ROWS, strict=True)
        ]
    )


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_trl_learns_no_image_token_from_messages(model, own_processor, tiny_repo, tmp_path, adapter):
    trl = pytest.importorskip("trl")
    config = LoraConfig(r=2, target_modules=r".*language_model.*o_proj", init_lora_weights=True)
    arguments = {"per_device_train_batch_size": 3, "learning_rate": 0.0}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=tmp_path, max_length=None, **TRL_ARGUMENTS | arguments),
        train_dataset=chat_rows(),
        processing_class=own_processor,
        peft_config=config if adapter else None,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    image_tokens = batch["input_ids"] == own_processor.image_token_id
    assert image_tokens.any(1).all()
    assert (batch["labels"][image_tokens] == -100).all()
    expected = next_token_loss(load_model(tiny_repo), {name: batch[name] for name in batch if name != "labels"})
    assert first_loss(trainer) == pytest.approx(expected * counted_share(batch), abs=2e-3)


# -- adapters ---------------------------------------------------------------------------------------------------------

TARGETS = {
    "tower": r".*vision_tower.*(q_proj|v_proj|fc1)",
    "resampler": r".*resampler.*(q_proj|kv_proj|fc1)",
    "language model": r".*language_model.*(qkv_proj|o_proj)",
    "all linear": "all-linear",
}


def adapted(model: torch.nn.Module, targets: str) -> torch.nn.Module:
    """A model with adapters that do something."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def gradients(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_get_the_same_gradients_under_reentrant_checkpoints(model, own_processor, targets):
    batch = dict(collate(own_processor)(range(3)))
    model = adapted(model, TARGETS[targets])
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    found = gradients(model, batch)
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    model.disable_input_require_grads()
    try:
        without = gradients(model, batch)
    except RuntimeError:  # nothing in the loss requires a gradient
        without = {}
    assert any(without.get(name) is None for name in expected), "enabling must matter, or the test shows nothing"


def test_a_frozen_tower_stays_out_of_the_backward_pass(model, own_processor):
    batch = dict(collate(own_processor)(range(3)))
    model = adapted(model, TARGETS["language model"])
    model.enable_input_require_grads()
    seen = []
    tower = model.get_base_model().vision_tower
    tower.register_forward_hook(lambda _, args, output: seen.append(output.last_hidden_state.requires_grad))
    gradients(model, batch)
    assert seen == [False]


@pytest.mark.parametrize("targets", ["tower", "all linear"])
def test_an_adapter_saved_on_the_other_transformers_line_loads(tiny_repo, own_processor, tmp_path, targets):
    """4.57 and 5 name the tower's layers with and without `vision_model`; so do the adapters they save."""
    batch = dict(collate(own_processor)(range(3)))
    trained = adapted(load_model(tiny_repo), TARGETS[targets]).eval()
    trained.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    ours, theirs = "vision_tower.vision_model.", "vision_tower."
    if not any(ours in name for name in weights):
        ours, theirs = theirs, ours
    save_file({name.replace(ours, theirs): tensor for name, tensor in weights.items()}, path, {"format": "pt"})
    renamed = load_file(path)
    assert renamed.keys() != weights.keys()
    loaded = PeftModel.from_pretrained(load_model(tiny_repo), tmp_path).eval()
    with torch.no_grad():
        expected, found = trained(**batch).logits, loaded(**batch).logits
        plain = load_model(tiny_repo).eval()(**batch).logits
    assert (plain - expected).abs().max() > 1e-2, "the adapter must matter, or the test shows nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
