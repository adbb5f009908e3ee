# SPDX-License-Identifier: Apache-2.0
"""The table of docs/finetuning.md: every row is tried here, on the transformers line that runs the tests."""

import re

import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from support import IS_TRANSFORMERS_5, ROOT, TRL_ARGUMENTS, load_model, render_image

trl = pytest.importorskip("trl")

HAS_ASSISTANT_MASKS = Version(transformers.__version__) >= Version("5.18")
DOCS = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
TABLE = DOCS.split("<!-- forms -->")[1].split("<!-- end -->")[0]
DOCUMENTED = {
    cells[0].strip(): cells[1 if not IS_TRANSFORMERS_5 else 2].strip()
    for cells in (line.strip("| ").split(" | ") for line in TABLE.strip().splitlines()[2:])
}
IMAGES = [render_image(150, 150, seed=1), render_image(60, 300, seed=2), render_image(200, 90, seed=3)]
QUESTION, ANSWERS = "What is in the image?", ["A red square.", "Two dogs."]
PROMPT = "<|user|>\n<image>\n{}<|end|>\n<|assistant|>\n"
ADAPTER = LoraConfig(r=2, target_modules=r".*language_model\..*\.(qkv_proj|o_proj)")


def turn(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def chat(answer: str) -> dict:
    return {"messages": turn("user", QUESTION) + turn("assistant", answer)}


def pair(answer: str) -> dict:
    return {"prompt": turn("user", QUESTION), "completion": turn("assistant", answer)}


def plain_pair(answer: str) -> dict:
    return {"prompt": PROMPT.format(QUESTION), "completion": f"{answer}<|end|>\n"}


def preference(answer: str) -> dict:
    answers = {"chosen": turn("assistant", answer), "rejected": turn("assistant", "No.")}
    return {"prompt": turn("user", QUESTION), **answers}


def data_of(make_row, images=None) -> datasets.Dataset:
    """Two rows with one image each, or with the images given."""
    images = [IMAGES[:1], IMAGES[1:2]] if images is None else images
    rows = [make_row(answer) | {"images": own} for answer, own in zip(ANSWERS, images, strict=True)]
    return datasets.Dataset.from_list(rows, features=datasets.Dataset.from_list(rows[:1]).features)


@pytest.fixture
def parts(tiny_repo):
    """A model and a processor of the test's own."""
    return load_model(tiny_repo), AutoProcessor.from_pretrained(tiny_repo, trust_remote_code=True)


def learned(trainer, processor) -> list[str]:
    """The text of each row that has a label; image tokens and padding must have none."""
    batch = next(iter(trainer.get_train_dataloader()))
    has_label = batch["labels"] != -100
    assert not (has_label & (batch["input_ids"] == processor.image_token_id)).any()
    assert (batch["labels"][has_label] == batch["input_ids"][has_label]).all()
    return [processor.decode(row[kept]) for row, kept in zip(batch["input_ids"], has_label, strict=True)]


def sft(parts, tmp_path, data, **arguments):
    model, processor = parts
    config = trl.SFTConfig(output_dir=str(tmp_path), **(TRL_ARGUMENTS | {"max_length": None} | arguments))
    return trl.SFTTrainer(model, config, train_dataset=data, processing_class=processor)


def train(trainer) -> float:
    """Train a step and give its loss."""
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < loss < 100
    return loss


@torch.no_grad()
def check_loss(model, trainer) -> None:
    """The loss of a step is the model's own; 4.57 also counts the labels of first tokens, which nothing predicts."""
    batch = dict(next(iter(trainer.get_train_dataloader())))
    is_label = batch["labels"] != -100
    counted = is_label[:, 1:] if IS_TRANSFORMERS_5 else is_label
    expected = model.train()(**batch).loss.item() * (is_label[:, 1:].sum() / counted.sum()).item()
    with torch.enable_grad():
        assert train(trainer) == pytest.approx(expected, rel=1e-3)


def check_answers(parts, trainer, answers=ANSWERS) -> None:
    """Answers alone are learned, with the token that ends them."""
    texts = [re.sub(r"\s+", " ", text).strip() for text in learned(trainer, parts[1])]
    assert sorted(texts) == sorted(f"{answer}<|end|>" for answer in answers)
    check_loss(parts[0], trainer)


def check_whole(parts, trainer) -> None:
    """The question is learned too, image tokens are not."""
    assert all(QUESTION in text and "<image>" not in text for text in learned(trainer, parts[1]))
    check_loss(parts[0], trainer)


# -- One function a row of the table ----------------------------------------------------------------------------------


def sft_pairs(parts, tmp_path):
    check_answers(parts, sft(parts, tmp_path, data_of(pair)))


def sft_plain_pairs(parts, tmp_path):
    check_answers(parts, sft(parts, tmp_path, data_of(plain_pair)))


def sft_one_image_column(parts, tmp_path):
    data = data_of(pair)
    rows = [{**{k: v for k, v in row.items() if k != "images"}, "image": row["images"][0]} for row in data]
    check_answers(parts, sft(parts, tmp_path, datasets.Dataset.from_list(rows)))


def sft_several_images(parts, tmp_path):
    check_answers(parts, sft(parts, tmp_path, data_of(pair, [IMAGES[:1], IMAGES[1:]])))


def sft_rows_without_images(parts, tmp_path):
    check_answers(parts, sft(parts, tmp_path, data_of(pair, [IMAGES[:1], []])))


def sft_messages(parts, tmp_path):
    check_whole(parts, sft(parts, tmp_path, data_of(chat)))


def sft_assistant_only(parts, tmp_path):
    check_answers(parts, sft(parts, tmp_path, data_of(chat), assistant_only_loss=True))


def sft_text(parts, tmp_path, **arguments):
    data = data_of(lambda answer: {"text": PROMPT.format(QUESTION) + answer})
    check_whole(parts, sft(parts, tmp_path, data, **arguments))


def sft_text_kept(parts, tmp_path):
    sft_text(parts, tmp_path, remove_unused_columns=False)


def sft_whole_pairs(parts, tmp_path):
    check_whole(parts, sft(parts, tmp_path, data_of(pair), completion_only_loss=False))


def sft_long_enough(parts, tmp_path):
    check_answers(parts, sft(parts, tmp_path, data_of(pair), max_length=1024))


def sft_too_short(parts, tmp_path):
    train(sft(parts, tmp_path, data_of(pair), max_length=10))


def sft_packing(parts, tmp_path):
    train(sft(parts, tmp_path, data_of(pair), packing=True, max_length=1024))


def sft_padding_free(parts, tmp_path):
    train(sft(parts, tmp_path, data_of(pair), padding_free=True))


def sft_pad_to_multiple(parts, tmp_path):
    train(sft(parts, tmp_path, data_of(pair), pad_to_multiple_of=8))


def sft_label_smoothing(parts, tmp_path):
    plain, smooth = (
        sft(parts, tmp_path, data_of(pair), label_smoothing_factor=factor, learning_rate=0.0) for factor in (0.0, 0.1)
    )
    batch = dict(next(iter(smooth.get_train_dataloader())))
    assert train(smooth) == pytest.approx(smoothed(parts[0], batch), rel=1e-3)
    assert train(plain) != pytest.approx(smoothed(parts[0], batch), rel=1e-3)


def sft_lora(parts, tmp_path):
    model, processor = parts
    config = trl.SFTConfig(output_dir=str(tmp_path), **TRL_ARGUMENTS, max_length=None)
    trainer = trl.SFTTrainer(
        model, config, train_dataset=data_of(pair), processing_class=processor, peft_config=ADAPTER
    )
    train(trainer)
    assert {name.split(".")[-2] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}


def sft_path(parts, tmp_path):
    train(sft((parts[0].name_or_path, parts[1]), tmp_path, data_of(pair)))


def sft_path_untrusted(parts, tmp_path):
    train(sft((parts[0].name_or_path, parts[1]), tmp_path, data_of(pair), trust_remote_code=False))


def dpo(parts, tmp_path, data, adapter=None, **arguments):
    model, processor = parts
    config = trl.DPOConfig(output_dir=str(tmp_path), **(TRL_ARGUMENTS | {"max_length": None} | arguments))
    return trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=processor, peft_config=adapter)


def check_first_preference_step(trainer) -> None:
    assert train(trainer) == pytest.approx(0.6931, abs=1e-3)  # before the first update both models agree


def dpo_pairs(parts, tmp_path):
    check_first_preference_step(dpo(parts, tmp_path, data_of(preference)))


def dpo_lora(parts, tmp_path):
    check_first_preference_step(dpo(parts, tmp_path, data_of(preference), ADAPTER))


def dpo_plain(parts, tmp_path):
    def row(answer: str) -> dict:
        return {"prompt": PROMPT.format(QUESTION), "chosen": f"{answer}<|end|>\n", "rejected": "No.<|end|>\n"}

    check_first_preference_step(dpo(parts, tmp_path, data_of(row)))


def dpo_untrusted(parts, tmp_path):
    check_first_preference_step(dpo(parts, tmp_path, data_of(preference), trust_remote_code=False))


def dpo_untrusted_lora(parts, tmp_path):
    check_first_preference_step(dpo(parts, tmp_path, data_of(preference), ADAPTER, trust_remote_code=False))


def dpo_path(parts, tmp_path):
    check_first_preference_step(dpo((parts[0].name_or_path, parts[1]), tmp_path, data_of(preference)))


def dpo_precomputed(parts, tmp_path):
    check_first_preference_step(dpo(parts, tmp_path, data_of(preference), precompute_ref_log_probs=True))


def grpo(parts, tmp_path, images=None, by_path=False, **arguments):
    model, processor = parts
    seen = []

    def reward(completions, answer, **_):
        seen.extend(answer)
        return [float(index) for index, _ in enumerate(completions)]

    settings = {"num_generations": 2, "max_completion_length": 4} | arguments
    data = data_of(lambda answer: {"prompt": turn("user", QUESTION), "answer": answer}, images)
    config = trl.GRPOConfig(output_dir=str(tmp_path), **(TRL_ARGUMENTS | settings))
    given = model.name_or_path if by_path else model
    trainer = trl.GRPOTrainer(given, reward, config, train_dataset=data, processing_class=processor)
    before = parts[0].lm_head.weight.detach().clone()
    trainer.train()
    assert set(seen) <= set(ANSWERS)
    assert len(seen) == 2
    assert not torch.equal(before, trainer.model.lm_head.weight)


def grpo_prompts(parts, tmp_path):
    grpo(parts, tmp_path)


def grpo_path(parts, tmp_path):
    grpo(parts, tmp_path, by_path=True)


def grpo_several_images(parts, tmp_path):
    grpo(parts, tmp_path, [IMAGES[1:], IMAGES[1:]])


def trainer_of(parts, tmp_path, **others):
    model, processor = parts
    rows = [
        {"text": PROMPT.format(QUESTION) + f"{answer}<|end|>\n", "images": [image]}
        for answer, image in zip(ANSWERS, IMAGES, strict=False)
    ]

    def collate(rows):
        texts, images = [row["text"] for row in rows], [row["images"] for row in rows]
        return processor(text=texts, images=images, padding=True, return_labels=True, return_tensors="pt")

    arguments = {name: value for name, value in TRL_ARGUMENTS.items() if name != "trust_remote_code"}
    arguments |= {"learning_rate": 0.0, "remove_unused_columns": False, **others}
    settings = TrainingArguments(output_dir=str(tmp_path), **arguments)
    return Trainer(model, settings, train_dataset=rows, data_collator=collate)


@torch.no_grad()
def smoothed(model, batch) -> float:
    """The loss with label smoothing 0.1, on labels shifted by one."""
    return LabelSmoother(epsilon=0.1)(model.train()(**batch), batch["labels"], shift_labels=True).item()


def trainer_rows(parts, tmp_path):
    check_answers(parts, trainer_of(parts, tmp_path))


def trainer_label_smoothing(parts, tmp_path):
    trainer = trainer_of(parts, tmp_path, label_smoothing_factor=0.1)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    assert train(trainer) == pytest.approx(smoothed(parts[0], batch), rel=1e-3)


ROWS = {
    "Trainer, `return_labels=True`": (trainer_rows, None),
    "Trainer, `label_smoothing_factor`": (trainer_label_smoothing, None),
    "SFT, `images`, `prompt`, `completion` as messages": (sft_pairs, None),
    "SFT, `images`, `prompt`, `completion` as text": (sft_plain_pairs, None),
    "SFT, one `image` in the place of `images`": (sft_one_image_column, None),
    "SFT, several images in a row": (sft_several_images, None),
    "SFT, rows without images among others": (sft_rows_without_images, None),
    "SFT, `images`, `messages`": (sft_messages, None),
    "SFT, the same with `assistant_only_loss=True`": (sft_assistant_only, "assistant_only_loss|assistant_masks|5.18"),
    "SFT, `images`, `text`": (sft_text, "Unexpected input keys"),
    "SFT, the same with `remove_unused_columns=False`": (sft_text_kept, None),
    "SFT, `completion_only_loss=False`": (sft_whole_pairs, None),
    "SFT, `max_length=1024` (TRL's default)": (sft_long_enough, None),
    "SFT, `max_length` shorter than a row": (sft_too_short, "max_length"),
    "SFT, `packing=True`": (sft_packing, "[Pp]acking"),
    "SFT, `padding_free=True`": (sft_padding_free, "[Pp]adding.free"),
    "SFT, `pad_to_multiple_of`": (sft_pad_to_multiple, "multiple"),
    "SFT, `label_smoothing_factor`": (sft_label_smoothing, None),
    "SFT, `peft_config`": (sft_lora, None),
    "SFT, the model by its path, `trust_remote_code=True`": (sft_path, None),
    "SFT, the model by its path, without": (sft_path_untrusted, "trust_remote_code"),
    "DPO, `images`, `prompt`, `chosen`, `rejected` as messages": (dpo_pairs, None),
    "DPO, the same as text": (dpo_plain, None),
    "DPO, `peft_config`": (dpo_lora, None),
    "DPO, without `trust_remote_code=True`": (dpo_untrusted, "trust_remote_code"),
    "DPO, `peft_config`, without `trust_remote_code=True`": (dpo_untrusted_lora, None),
    "DPO, the model by its path, `trust_remote_code=True`": (dpo_path, None),
    "DPO, `precompute_ref_log_probs=True`": (dpo_precomputed, "precompute"),
    "GRPO, `images`, `prompt` as messages": (grpo_prompts, None),
    "GRPO, several images in a row": (grpo_several_images, None),
    "GRPO, the model by its path, `trust_remote_code=True`": (grpo_path, None),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_table_is_what_happens(name, parts, tmp_path):
    attempt, message = ROWS[name]
    works = message is None or ("assistant_only" in name and HAS_ASSISTANT_MASKS)
    if works:
        attempt(parts, tmp_path)
    else:
        with pytest.raises(Exception, match=message):
            attempt(parts, tmp_path)
    assert DOCUMENTED[name] == ("yes" if works else "no")


def test_the_table_has_no_row_that_is_not_tried():
    assert list(DOCUMENTED) == list(ROWS)
