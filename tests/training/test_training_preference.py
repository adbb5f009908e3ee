# SPDX-License-Identifier: Apache-2.0
"""Preference training: batches with each prompt once, the loss and its two terms, and TRL's loss beside ours."""

import itertools
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from blip3.data.images import ImageSource
from blip3.data.records import Record, Turn, to_preference
from blip3.training.encode import TooLongError
from blip3.training.lora import add_adapters, count_weights
from blip3.training.noise import NUM_STEPS, Noiser, add_noise, noise_deviation, signal_shares
from blip3.training.pairs import ANSWERS, PairCollator, PairEncoder, branch_mask, pair_key
from blip3.training.preference import PreferenceObjective, answer_log_probs, preference_loss
from blip3.training.recipe import LoraSettings, Recipe
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_records
from support import TRL_ARGUMENTS, load_model
from support.training import WORLD

SETTINGS = settings_from(WORLD, "the test")
TEXT_ONLY = Record("t", "preference", (), (Turn("user", "What follows 3?"),), "It is 4.", "It is 5, I believe.")
NO_ANSWERS: dict[str, str] = {}


def make_recipe(**changes) -> Recipe:
    values = {
        "model": "m",
        "output": "o",
        "max_steps": 1,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "mixture": [{"rendered": "preference"}],
        "trainable": ("language_model",),
        "lora": {"rank": 2, "alpha": 4},
        "loss": "preference",
    }
    return Recipe(**(values | changes))


@pytest.fixture(scope="module")
def processor(small_model):
    return AutoProcessor.from_pretrained(small_model, trust_remote_code=True)


@pytest.fixture
def adapted(small_model):
    """A model with adapters that have learned nothing yet."""
    torch.manual_seed(0)
    return add_adapters(load_model(small_model), LoraSettings(2, 4), "small").train()


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Pairs about images of different sizes, the last one without any."""
    return [*rendered_records("preference", seed=3, count=3, settings=SETTINGS), TEXT_ONLY]


@pytest.fixture(scope="module")
def answers(records) -> dict[str, str]:
    """Noised answers to two of them."""
    return {pair_key(records[0]): "The picture shows nothing at all.", pair_key(records[2]): "It is grey."}


def make_batch(processor, records, answers=NO_ANSWERS, noiser=None) -> dict[str, torch.Tensor]:
    encoder = PairEncoder(processor, 1000, noised_answers=answers, noiser=noiser)
    return PairCollator(processor.tokenizer.pad_token_id)([encoder(record) for record in records])


def disturb(model) -> None:
    """Give adapters weights, as if they had learned something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 3


@torch.no_grad()
def log_prob_alone(model, processor, record: Record, answer: str) -> float:
    """The log-probability of an answer, from its conversation alone in a batch: nothing shared, nothing padded."""
    messages = [*to_preference(record)["prompt"], {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    text = processor.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    images = [image.open() for image in record.images]
    inputs = processor(text=text, images=images or None, return_tensors="pt", return_labels=True)
    labels = inputs.pop("labels")[0, 1:]
    logits = model(**inputs).logits[0, :-1].log_softmax(-1)
    # Labels begin behind <|assistant|>: the line break there belongs to the prompt.
    kept = torch.nonzero(labels != -100)[:, 0]
    skipped = len(processor.tokenizer("<|assistant|>\n", add_special_tokens=False)["input_ids"]) - 1
    kept = kept[skipped:]
    return logits[kept, labels[kept]].sum().item()


# -- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_answers_that_share_a_prompt_are_as_likely_as_alone(small_model, processor, records, answers, attention):
    model = load_model(small_model, attn_implementation=attention).train()
    model = add_adapters(model, LoraSettings(2, 4), "small")
    disturb(model)
    batch = make_batch(processor, records, answers)
    logits: list[torch.Tensor] = []
    model.base_model.model.register_forward_hook(lambda _, args, output: logits.append(output.logits.detach()))
    PreferenceObjective(make_recipe(noised_weight=1.0, noised_answers="f"))(model, batch)
    found = answer_log_probs(logits[0], batch)
    for row, record in enumerate(records):
        texts = (record.chosen, record.rejected, answers.get(pair_key(record)))
        expected = [0.0 if text is None else log_prob_alone(model, processor, record, text) for text in texts]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_row_holds_a_prompt_once_and_nothing_else(processor, records, answers):
    encoder = PairEncoder(processor, 1000, noised_answers=answers)
    samples = [encoder(record) for record in records]
    batch = make_batch(processor, records, answers)
    longest = max(len(sample["prompt"]) for sample in samples)
    widths = [sum(len(sample[name]) for name in ANSWERS if name in sample) for sample in samples]
    assert batch["input_ids"].shape[1] == longest + max(widths)
    for row, sample in enumerate(samples):
        for number, name in enumerate(("prompt", *ANSWERS)):
            ids = batch["input_ids"][row, batch["branch"][row] == number]
            assert ids.tolist() == sample.get(name, torch.tensor([])).tolist()
    assert batch["has_images"].tolist() == [True, True, True, False]


def test_each_token_sees_its_prompt_and_its_own_answer():
    branch = torch.tensor([[-1, 0, 0, 1, 1, 2, -1]])
    positions = torch.tensor([[0, 0, 1, 2, 3, 2, 0]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert branch_mask(branch, positions)[0, 0].int().tolist() == expected
    assert branch_mask(branch, positions, window=2)[0, 0, 4].int().tolist() == [0, 0, 0, 1, 1, 0, 0]
    assert branch_mask(branch, positions, window=2)[0, 0, 5].int().tolist() == [0, 0, 1, 0, 0, 1, 0]


def test_pairs_that_are_too_long_or_no_pairs_are_refused(processor, records):
    sample = PairEncoder(processor, 1000)(records[0])
    length = len(sample["prompt"]) + max(len(sample["chosen"]), len(sample["rejected"]))
    PairEncoder(processor, length)(records[0])
    with pytest.raises(TooLongError, match=rf"{length} tokens .* max_length is {length - 1}"):
        PairEncoder(processor, length - 1)(records[0])
    other = next(rendered_records("name", count=1, settings=SETTINGS))
    with pytest.raises(ValueError, match="DPO needs preference records"):
        PairEncoder(processor, 1000)(other)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_first_loss_is_ln_2_for_each_term(adapted, processor, records, answers):
    objective = PreferenceObjective(make_recipe())
    assert objective(adapted, make_batch(processor, records))[0].item() == pytest.approx(math.log(2), abs=1e-5)
    both = PreferenceObjective(make_recipe(noised_weight=1.0, noised_answers="f"))
    batch = make_batch(processor, [records[0], records[2]], answers)
    assert both(adapted, batch)[0].item() == pytest.approx(2 * math.log(2), abs=1e-5)
    half, figures = both(adapted, make_batch(processor, records, answers))
    assert half.item() == pytest.approx(1.5 * math.log(2), abs=1e-5), "two of four pairs have a second term"
    assert figures["noised/share"] == 0.5
    anchored = PreferenceObjective(make_recipe(anchor=0.5))
    assert anchored(adapted, make_batch(processor, records))[0].item() == pytest.approx(1.5 * math.log(2), abs=1e-5)


def test_the_loss_is_the_formula():
    rewards = {name: torch.tensor(values) for name, values in
               {"chosen": [0.3, -0.2], "rejected": [-0.1, 0.4], "noised": [0.5, 9.0]}.items()}  # fmt: skip
    found = preference_loss(rewards, torch.tensor([True, False]), noised_weight=0.5, anchor=2.0)

    def term(value: float) -> float:
        return math.log(1 + math.exp(-value))

    expected = (term(0.4) + 0.5 * term(-0.2) + 2 * term(0.3) + term(-0.6) + 2 * term(-0.2)) / 2
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_both_terms_teach_and_the_reference_stays(adapted, processor, records, answers):
    batch = make_batch(processor, records, answers)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    objective = PreferenceObjective(make_recipe(noised_weight=1.0, noised_answers="f"))
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    rewards = []
    for _ in range(16):
        loss, figures = objective(adapted, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append((figures["rewards/margins"], figures["noised/margins"], loss.item()))
    assert rewards[0][:2] == (0.0, 0.0)
    assert rewards[-1][0] > 0
    assert rewards[-1][1] > 0
    assert rewards[-1][2] < rewards[0][2]
    assert figures["rewards/accuracies"] == 1.0
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name and ".language_model." in name for name in changed)


@pytest.mark.parametrize("places", [slice(3), slice(1, 4)], ids=["images", "one pair of text alone"])
def test_trl_computes_the_same_loss(adapted, small_model, processor, records, tmp_path, places):
    trl = pytest.importorskip("trl")
    disturb(adapted)
    shown = records[places]
    found = PreferenceObjective(make_recipe(beta=1.0))(adapted, make_batch(processor, shown))[0].item()
    rows = [{**to_preference(record), "images": [image.open() for image in record.images]} for record in shown]
    trainer = trl.DPOTrainer(
        load_model(small_model),
        args=trl.DPOConfig(
            str(tmp_path), **(TRL_ARGUMENTS | {"per_device_train_batch_size": 3}), max_length=None, beta=1.0
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=adapted.peft_config["default"],
    )
    theirs = trainer.model.train()
    weights = {name: tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    expected = trainer.compute_loss(theirs, next(iter(trainer.get_train_dataloader()))).item()
    assert abs(expected - math.log(2)) > 1e-2, "adapters that do nothing would show nothing"
    assert found == pytest.approx(expected, abs=1e-4)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "passes"), [
    ({}, 1),
    ({"noised_weight": 1.0, "noised_answers": "f"}, 1),
    ({"noised_weight": 1.0}, 2),
], ids=["one term", "generated", "teacher-forced"])  # fmt: skip
def test_images_of_a_pair_are_encoded_once(adapted, processor, records, answers, changes, passes):
    noiser = Noiser(500, "normalised", 0) if passes == 2 else None
    batch = make_batch(processor, records, answers if "noised_answers" in changes else NO_ANSWERS, noiser)
    counts = {"tower": 0, "decoder": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    adapted.base_model.model.vision_tower.register_forward_hook(count("tower"))
    adapted.base_model.model.language_model.register_forward_hook(count("decoder"))
    loss, _ = PreferenceObjective(make_recipe(**changes))(adapted, batch)
    loss.backward()
    assert counts == {"tower": passes, "decoder": 1 + passes}


@torch.no_grad()
def teacher_forced_margin(model, processor, record: Record, noiser: Noiser) -> float:
    """The chosen answer's log ratio less that of the likeliest tokens under noise, from passes of one row each."""
    messages = [*to_preference(record)["prompt"], *to_preference(record)["chosen"]]
    text = processor.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    images = [image.open() for image in record.images]
    clean = processor(text=text, images=images, return_tensors="pt")
    length = len(PairEncoder(processor, 1000)(record)["chosen"])
    places = slice(-1 - length, -1)
    tokens = model(**noiser.prepare(processor, text, images, record.id)).logits[0, places].argmax(-1)
    policy = model(**clean).logits[0, places].log_softmax(-1)
    with model.disable_adapter():
        reference = model(**clean).logits[0, places].log_softmax(-1)
    ratios = policy - reference
    rows = torch.arange(length)
    return (ratios[rows, clean["input_ids"][0, -length:]].sum() - ratios[rows, tokens].sum()).item()


def test_teacher_forced_answers_are_the_likeliest_tokens_under_noise(adapted, processor, records):
    disturb(adapted)
    shown = [record for record in records if record.images][:2]
    noiser = Noiser(700, "normalised", 0)
    _, figures = PreferenceObjective(make_recipe(noised_weight=1.0))(
        adapted, make_batch(processor, shown, noiser=noiser)
    )
    assert figures["noised/share"] == 1.0
    margins = [0.1 * teacher_forced_margin(adapted, processor, record, noiser) for record in shown]
    assert figures["noised/margins"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert abs(np.mean(margins)) > 1e-3


# -- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "deviation"), [
    (100, 0.058), (200, 0.110), (250, 0.147), (300, 0.194), (350, 0.254), (400, 0.327), (500, 0.505),
])  # fmt: skip
def test_the_noise_is_that_of_the_published_schedule(step, deviation):
    """Values computed from VCD's code, apart from ours."""
    assert noise_deviation(step) == pytest.approx(deviation, abs=6e-4)
    pixels = torch.full((200, 200), 0.5)
    noised = add_noise(pixels, step, torch.Generator().manual_seed(0))
    assert noised.std().item() == pytest.approx(deviation, rel=0.02)
    assert noised.mean().item() == pytest.approx(0.5 * math.sqrt(1 - deviation**2), abs=0.02)


def test_the_signal_falls_from_all_to_nearly_nothing():
    shares = signal_shares()
    assert len(shares) == NUM_STEPS
    assert all(after < before for before, after in itertools.pairwise(shares))
    assert shares[0] == pytest.approx(1, abs=1e-4)
    assert noise_deviation(900) == pytest.approx(0.93, abs=0.01)


@pytest.mark.parametrize("pixels", ["normalised", "unit"])
def test_noise_follows_from_seed_and_record_alone(processor, pixels):
    image = Image.fromarray(np.full((60, 60, 3), 128, np.uint8))
    clean = processor(text="<image>", images=[image], return_tensors="pt")

    def noised(seed: int, name: str) -> torch.Tensor:
        return Noiser(300, pixels, seed).prepare(processor, "<image>", [image], name)["pixel_values"]

    assert torch.equal(noised(0, "a"), noised(0, "a"))
    assert not torch.equal(noised(0, "a"), noised(1, "a"))
    assert not torch.equal(noised(0, "a"), noised(0, "b"))
    assert noised(0, "a").shape == clean["pixel_values"].shape
    unchanged = Noiser(0, pixels, 0).prepare(processor, "<image>", [image], "a")["pixel_values"]
    assert (unchanged - clean["pixel_values"]).abs().max() < 0.05


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_are_on_the_language_models_linear_layers_alone(adapted):
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * 4  # two matrices, two layers, four linear layers each
    assert all(".language_model." in name and "lora_" in name for name in names)
    assert not any("lm_head" in name for name in names)
    adapters, weights = count_weights(adapted)
    assert adapters == sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert weights == sum(p.numel() for n, p in adapted.base_model.model.language_model.named_parameters()
                          if "lora_" not in n)  # fmt: skip


def test_layers_that_a_model_does_not_have_are_passed_over_but_one_must_be_there(small_model):
    with pytest.raises(ValueError, match=r"lora targets q_proj, k_proj but the language model has no layer"):
        add_adapters(load_model(small_model), LoraSettings(2, 4, targets=("q_proj", "k_proj")), "small")
    one = add_adapters(load_model(small_model), LoraSettings(2, 4, targets=("q_proj", "o_proj")), "small")
    assert len([1 for parameter in one.parameters() if parameter.requires_grad]) == 2 * 2


def test_images_may_lie_in_files(processor, records, tmp_path):
    """A pair read from disk is encoded as the rendered one is."""
    records[0].images[0].open().save(tmp_path / "a.png")
    read = replace(records[0], images=(ImageSource(path=str(tmp_path / "a.png")),))
    one, other = (PairEncoder(processor, 1000)(record) for record in (records[0], read))
    assert all(torch.equal(one[name], other[name]) for name in one)
