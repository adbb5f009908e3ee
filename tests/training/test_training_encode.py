# SPDX-License-Identifier: Apache-2.0
"""Records to samples to batches: labels, cutting, padding, and packing that changes no number."""

import doctest
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from blip3.data.canvas import Drawing
from blip3.data.images import ImageSource
from blip3.data.records import DOCUMENT_KINDS, Record, Turn
from blip3.training import encode
from blip3.training.encode import (
    IGNORE_INDEX,
    Collator,
    Encoder,
    TooLongError,
    first_fit,
    join_images,
    pack,
    pad,
    shorten,
)
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_record
from support import load_model
from support.training import WORLD

LATENTS = 4
SIZES = ((48, 48), (60, 40), (40, 90))  # all get two tiles beside the global view
WORDS = ["red", "blue", "a", "star", "is", "above", "the", "cat", "two", "things", "read", "what"]


@pytest.fixture(scope="module")
def small_processor(small_model):
    return AutoProcessor.from_pretrained(small_model, trust_remote_code=True)


@pytest.fixture(scope="module")
def encoder(small_processor) -> Encoder:
    return Encoder(small_processor, 10_000)


def image(number: int) -> ImageSource:
    """A plain image whose colour tells which it is."""
    colour = f"#{(37 * number + 11) % 256:02x}{(91 * number + 5) % 256:02x}{(53 * number + 200) % 256:02x}"
    return ImageSource(drawing=Drawing(SIZES[number % 3], ("plain", colour), ()))


def chat(*turns: str, system: str = "", num_images: int = 0) -> Record:
    roles = [("user", "assistant")[index % 2] for index in range(len(turns))]
    told = [Turn(role, text) for role, text in zip(roles, turns, strict=True)]
    told = [Turn("system", system), *told] if system else told
    return Record("chat", "instruction", tuple(map(image, range(num_images))), tuple(told))


def document(*chunks: str, kind: str = "interleaved") -> Record:
    num_images = sum(chunk.count("<image>") for chunk in chunks)
    turns = tuple(Turn("document", chunk) for chunk in chunks)
    return Record("document", kind, tuple(map(image, range(num_images))), turns)


def few_shot(num_shots: int) -> Record:
    turns = [Turn("document", f"<image>Question:Which? Short answer:{WORDS[n % 7]}") for n in range(num_shots)]
    turns += [Turn("user", "<image>Question:Which? Short answer:"), Turn("assistant", "dax")]
    return Record("shots", "few_shot", tuple(map(image, range(num_shots + 1))), tuple(turns))


def learned(sample: dict, processor: object) -> str:
    """The text that is learned; a mark stands where something is left out."""
    pieces, is_open = [], False
    for token, label in zip(sample["input_ids"].tolist(), sample["labels"].tolist(), strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            pieces.append(processor.tokenizer.convert_ids_to_tokens(token).replace("\u2581", " "))
        elif is_open:
            pieces.append("|")
        is_open = label != IGNORE_INDEX
    return "".join(pieces)


# -- labels -----------------------------------------------------------------------------------------------------------


def test_chats_learn_answers_alone(encoder, small_processor):
    sample = encoder(chat("<image>\nWhat is it?", "A red star.", "And now?", "Two.", system="Be kind.", num_images=1))
    assert learned(sample, small_processor) == "A red star.<|end|>|Two.<|end|>"
    text = small_processor.tokenizer.decode(sample["input_ids"])
    assert "Be kind." in text
    assert text.endswith("Two.<|end|>"), "nothing follows the last answer"
    assert (sample["input_ids"] == small_processor.image_token_id).sum() == 3 * LATENTS


def test_chats_without_images_have_none(encoder, small_processor):
    sample = encoder(chat("What is two and two?", "It is four."))
    assert sample.keys() == {"input_ids", "labels"}
    assert learned(sample, small_processor) == "It is four.<|end|>"


def test_documents_learn_text_and_its_end(encoder, small_processor):
    """As in the report's code, images, padding and the end of a chunk are left out of the loss."""
    sample = encoder(document("A star <image> above", "<image>the cat"))
    assert learned(sample, small_processor) == " star|above|the cat|<|endoftext|>"  # nothing comes before "A"


def test_the_end_of_a_chunk_is_learned_on_request(small_processor):
    sample = Encoder(small_processor, 1000, learn_end_of_chunk=True)(document("<image>red", kind="caption"))
    assert learned(sample, small_processor) == "red<|endofchunk|><|endoftext|>"
    sample = Encoder(small_processor, 1000, learn_end_of_chunk=True)(few_shot(1))
    assert learned(sample, small_processor).endswith("answer:dax<|endofchunk|><|endoftext|>")


def test_few_shot_prompts_learn_their_answers_alone_on_request(small_processor):
    whole = Encoder(small_processor, 1000, learn_end_of_chunk=True)
    answers = Encoder(small_processor, 1000, learn_end_of_chunk=True, learn_questions=False)
    assert learned(whole(few_shot(1)), small_processor).startswith("Question:Which? Short answer:red<|endofchunk|>|Qu")
    ends = "red<|endofchunk|>|blue<|endofchunk|>|dax<|endofchunk|><|endoftext|>"
    assert learned(answers(few_shot(2)), small_processor) == ends
    for record in (document("<image>The short answer:red", kind="caption"), chat("Short answer:", "red")):
        assert answers(record)["labels"].tolist() == whole(record)["labels"].tolist()
    told = Record(
        "words", "few_shot", (), (Turn("document", "red:wug"), Turn("user", "red:"), Turn("assistant", "wug"))
    )
    assert answers(told)["labels"].tolist() == whole(told)["labels"].tolist(), "no question to leave out"


@pytest.mark.parametrize("kind", DOCUMENT_KINDS)
def test_the_first_token_is_never_learned(encoder, kind):
    sample = encoder(document("red star", kind=kind))
    assert sample["labels"][0] == IGNORE_INDEX
    assert (sample["labels"][1:3] != IGNORE_INDEX).all()


def test_base_resolution_gives_the_global_view_alone(small_processor):
    sample = Encoder(small_processor, 1000, any_resolution=False)(document("<image>red", kind="caption"))
    assert (sample["input_ids"] == small_processor.image_token_id).sum() == LATENTS
    assert sample["image_sizes"].tolist() == [[0, 0]]


def test_any_resolution_cuts_tiles_whatever_the_processor_does_by_default(small_processor):
    """Stage 2 starts from a base model, whose image processor gives the global view alone."""
    sample = Encoder(small_processor, 1000)(document("<image>red", kind="caption"))
    with patch.object(small_processor.image_processor, "do_image_splitting", False):
        again = Encoder(small_processor, 1000, any_resolution=True)(document("<image>red", kind="caption"))
    assert sample.keys() == again.keys()
    assert all(torch.equal(sample[name], again[name]) for name in sample)


# -- cutting ----------------------------------------------------------------------------------------------------------

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@st.composite
def records(draw) -> Record:
    kind = draw(st.sampled_from(["instruction", "interleaved", "few_shot"]))
    if kind == "few_shot":
        return few_shot(draw(st.integers(0, 5)))
    with_images = st.tuples(texts, st.integers(0, 2)).map(lambda pair: "<image>" * pair[1] + "\n" + pair[0])
    asked = draw(st.lists(with_images, min_size=1, max_size=5))
    if kind == "interleaved":
        return document(*asked)
    turns = [turn for question in asked for turn in (question, draw(texts))]
    count = sum(question.count("<image>") for question in asked)
    return chat(*turns, system=draw(st.sampled_from(["", "Be kind."])), num_images=count)


@settings(max_examples=60, deadline=None)
@given(record=records(), max_length=st.integers(10, 160))
def test_long_samples_are_cut_between_turns_and_never_in_a_image(small_processor, encoder, record, max_length):
    whole = encoder(record)
    try:
        cut = Encoder(small_processor, max_length)(record)
    except TooLongError:
        assert len(whole["input_ids"]) > max_length
        return
    ids, all_ids = cut["input_ids"].tolist(), whole["input_ids"].tolist()
    assert len(ids) <= max_length
    assert (len(ids) == len(all_ids)) == (len(all_ids) <= max_length)
    kept = len(cut.get("image_sizes", ()))
    assert ids.count(small_processor.image_token_id) == 3 * LATENTS * kept
    end_of_text = small_processor.tokenizer.eos_token_id
    if record.kind == "few_shot":  # the question stays
        begins_with_bos = ids[0] == small_processor.tokenizer.bos_token_id
        assert ids[begins_with_bos:] == all_ids[len(all_ids) - len(ids) + begins_with_bos :]
        images = slice(len(record.images) - kept, None)
    else:
        is_document = record.kind == "interleaved"
        assert ids[: len(ids) - is_document] == all_ids[: len(ids) - is_document]
        last = ["<|endofchunk|>", "<|endoftext|>"] if is_document else ["<|end|>"]
        assert small_processor.tokenizer.convert_ids_to_tokens(ids[-len(last) :]) == last
        assert not is_document or ids[-1] == end_of_text
        images = slice(0, kept)
    if kept:
        assert torch.equal(cut["pixel_values"], whole["pixel_values"][images])


def test_what_cannot_be_cut_is_named(small_processor):
    short = Encoder(small_processor, 8)
    for record in (chat("<image>\nWhat?", "A star.", num_images=1), document("<image>red"), few_shot(0), few_shot(3)):
        with pytest.raises(
            TooLongError, match=rf"{record.id}.*takes \d+ tokens for its first turn but max_length is 8"
        ):
            short(record)


def test_shorten_drops_one_exchange_or_chunk():
    record = chat("<image>\na", "b", "<image> c", "d", system="s", num_images=2)
    shorter = shorten(record, 20, 10)
    assert [turn.text for turn in shorter.turns] == ["s", "<image>\na", "b"]
    assert shorter.images == record.images[:1]
    shots = shorten(few_shot(2), 20, 10)
    assert shots.images == few_shot(2).images[1:]
    assert shots.turns == few_shot(2).turns[1:]


# -- batches ----------------------------------------------------------------------------------------------------------

MIXED = [
    chat("<image>\nWhat is it?", "A red star.", num_images=1),
    chat("What is two and two?", "It is four."),
    document("red <image> star", "<image>blue"),
    few_shot(2),
    document("the cat is above"),
    chat("<image> or <image>?", "The star.", "And?", "Two.", num_images=2),
]
TEXT_ONLY = [MIXED[1], MIXED[4]]


@pytest.fixture(scope="module")
def mixed(encoder) -> list[dict]:
    return [encoder(record) for record in MIXED]


def test_padding(mixed):
    batch = pad(mixed, pad_id=7)
    longest = max(len(sample["input_ids"]) for sample in mixed)
    for row, sample in enumerate(mixed):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row].tolist() == sample["input_ids"].tolist() + [7] * (longest - length)
        assert batch["labels"][row].tolist() == sample["labels"].tolist() + [IGNORE_INDEX] * (longest - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
    assert len(batch["pixel_values"]) == 8
    assert torch.equal(batch["pixel_values"][1:3], mixed[2]["pixel_values"])


def test_packing_by_hand():
    samples = [{"input_ids": torch.arange(n) + 10 * n, "labels": torch.arange(n) + 100 * n} for n in (3, 7, 5, 2)]
    batch = pack(samples, pad_id=0, max_length=10)
    assert batch["input_ids"].tolist() == [
        [70, 71, 72, 73, 74, 75, 76, 30, 31, 32],
        [50, 51, 52, 53, 54, 20, 21, 0, 0, 0],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 0, 1, 2]]
    assert batch["labels"][1].tolist() == [500, 501, 502, 503, 504, 200, 201, *[IGNORE_INDEX] * 3]
    assert batch.keys() == {"input_ids", "position_ids", "labels"}


def test_doctests():
    result = doctest.testmod(encode)
    assert result.failed == 0
    assert result.attempted > 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 120))
def test_first_fit(lengths, max_length):
    rows = first_fit(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in row) for row in rows)
    assert sums[-1] <= max_length
    if len(rows) > 1:
        assert sums[0] + sums[1] > max_length, "no two rows fit into one"
    assert first_fit(lengths, max_length) == rows


def gradients(model: torch.nn.Module, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("max_length", [1000, 90], ids=["one row", "several rows"])
@pytest.mark.parametrize("which", ["mixed", "text only", "one"])
def test_packed_loss_and_gradients_equal_unpacked(small_model, encoder, which, max_length):
    samples = [encoder(record) for record in {"mixed": MIXED, "text only": TEXT_ONLY, "one": MIXED[:1]}[which]]
    model = load_model(small_model).train()
    padded = Collator(0, packing=False, max_length=max_length)(samples)
    packed = Collator(0, packing=True, max_length=max_length)(samples)
    assert packed["input_ids"].shape[1] <= max_length
    assert "attention_mask" not in packed
    loss, expected = gradients(model, padded)
    packed_loss, found = gradients(model, packed)
    assert packed_loss == pytest.approx(loss, abs=1e-6)  # worst seen 0
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=5e-7, msg=name)  # 5e-8


def test_packed_samples_do_not_see_each_other(small_model, encoder):
    samples = [encoder(record) for record in MIXED[:3]]
    model = load_model(small_model).train()
    packed = pack(samples, 0, 1000)
    alone = model(**pad(samples[1:2], 0)).logits[0]
    starts = (packed["position_ids"][0] == 0).nonzero().flatten().tolist()
    order = sorted(range(3), key=lambda index: -len(samples[index]["input_ids"]))
    start = starts[order.index(1)]
    logits = model(**packed).logits[0, start : start + len(alone)]
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    without_positions = {name: value for name, value in packed.items() if name != "position_ids"}
    assert (model(**without_positions).logits[0, start : start + len(alone)] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("packing", [False, True])
def test_batches_without_images_train(small_model, encoder, packing):
    batch = Collator(0, packing, 1000)([encoder(record) for record in TEXT_ONLY])
    assert "pixel_values" not in batch
    assert join_images([encoder(record) for record in TEXT_ONLY]) == {}
    _, found = gradients(load_model(small_model).train(), batch)
    assert any("resampler" in name for name in found), "every trainable module takes part, with a gradient of zero"


@pytest.mark.parametrize("task", ["caption", "ocr", "grounding", "interleaved", "rule", "read", "dialogue", "refusal"])
def test_rendered_records_encode(encoder, task):
    sample = encoder(rendered_record(task, settings=settings_from(WORLD)))
    assert (sample["labels"] != IGNORE_INDEX).any()
    assert sample["input_ids"].dtype == sample["labels"].dtype == torch.long
