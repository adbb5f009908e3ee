# SPDX-License-Identifier: Apache-2.0
"""Row i of a mixed batch is row i alone, however it is generated, and images never change rows."""

import copy
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from blip3.hub import model_code
from support import IS_TRANSFORMERS_5, render_image

CACHE_NAME = model_code("generation_blip3.CACHE_NAME")
group_rows_by_length = model_code("generation_blip3.group_rows_by_length")
grow_in_place = model_code("generation_blip3.grow_in_place")
run_decoder = model_code("generation_blip3.run_decoder")

PROMPT = "<|user|>\n{}<|end|>\n<|assistant|>\n"
QUESTIONS = [
    ("What is in the image? <image>", [(150, 150)]),
    ("How many dogs are there?", []),
    ("Look: <image> and <image>, then <image>. Read the number.", [(60, 300), (90, 40), (200, 190)]),
    ("<image>\n<image>\nIs the red one to the left?", [(76, 152), (30, 20)]),
]
ROWS = [
    (PROMPT.format(question), [render_image(*size, seed=10 * row + k) for k, size in enumerate(sizes)])
    for row, (question, sizes) in enumerate(QUESTIONS)
]
NEW_TOKENS = 8


def generate(model, processor, rows, **kwargs) -> list[list[int]]:
    """New ids, one list per returned sequence."""
    texts, images = [text for text, _ in rows], [shown for _, shown in rows]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False} | kwargs
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def rowwise_sampling(monkeypatch):
    """Sample each row's token from a stream of its own, so that sampling does not depend on its neighbours."""
    state = {}

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        step = state["step"] = state.get("step", -1) + 1
        rows = state["rows"]
        sampled = []
        for row, p in zip(rows, probabilities, strict=True):
            uniform = torch.rand(1, generator=torch.Generator().manual_seed(1000 * row + step), dtype=torch.float64)
            sampled.append(torch.searchsorted(p.double().cumsum(0), uniform * p.double().sum()).clamp(max=len(p) - 1))
        assert num_samples == 1
        return torch.stack(sampled)

    def start(rows: list[int]) -> None:
        state.clear()
        state["rows"] = rows

    monkeypatch.setattr(torch, "multinomial", multinomial)
    return start


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"num_beams": 3, "num_return_sequences": 2}, id="beams returning two"),
        pytest.param({"cache_implementation": "static", "disable_compile": True}, id="static cache"),
        pytest.param({"use_cache": False}, id="no cache"),
        pytest.param({"repetition_penalty": 1.2}, id="penalty"),
    ],
)
@pytest.mark.parametrize("repo", ["tiny_model", "unfused_model"])
def test_rows_of_a_batch_equal_rows_alone(request, processor, kwargs, repo):
    model = request.getfixturevalue(repo)
    together = generate(model, processor, ROWS, **kwargs)
    alone = [sequence for row in ROWS for sequence in generate(model, processor, [row], **kwargs)]
    assert together == alone
    assert len({tuple(sequence) for sequence in together}) == len(together), (
        "rows must differ, or the test shows nothing"
    )


def test_sampled_rows_equal_rows_alone(tiny_model, processor, rowwise_sampling):
    kwargs = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    rowwise_sampling([0, 1, 2, 3])
    together = generate(tiny_model, processor, ROWS, **kwargs)
    alone = []
    for index, row in enumerate(ROWS):
        rowwise_sampling([index])
        alone += generate(tiny_model, processor, [row], **kwargs)
    assert together == alone
    assert together != generate(tiny_model, processor, ROWS), "sampling must differ from greedy, or it shows nothing"


def test_sampled_return_sequences_equal_rows_alone(tiny_model, processor, rowwise_sampling):
    kwargs = {"do_sample": True, "top_k": 0, "num_return_sequences": 2}
    rowwise_sampling(list(range(8)))
    together = generate(tiny_model, processor, ROWS, **kwargs)
    alone = []
    for index, row in enumerate(ROWS):
        rowwise_sampling([2 * index, 2 * index + 1])
        alone += generate(tiny_model, processor, [row], **kwargs)
    assert together == alone


def test_compiled_decoding_has_no_graph_break_and_the_same_rows(tiny_model, processor):
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True  # transformers compiles on accelerators only unless told so
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = generate(
        tiny_model, processor, ROWS, cache_implementation="static", compile_config=compile_config, max_length=None
    )
    assert sum(torch._dynamo.utils.counters["stats"].values()) > 0, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled == generate(tiny_model, processor, ROWS)


def test_exchanging_two_images_changes_the_answer(tiny_model, processor):
    text, images = ROWS[2]
    answers = {
        tuple(generate(tiny_model, processor, [(text, [images[i] for i in order])])[0])
        for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0])
    }
    assert len(answers) == 3


def test_base_resolution_rows_equal_rows_alone(tiny_model, processor):
    def run(rows):
        texts, images = [text for text, _ in rows], [shown for _, shown in rows]
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt", do_image_splitting=False)
        assert inputs.get("image_sizes", torch.zeros(1)).abs().sum() == 0
        new = tiny_model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        return new[:, inputs["input_ids"].shape[1] :].tolist()

    assert run(ROWS) == [run([row])[0] for row in ROWS]


def test_embeddings_beside_ids_leave_the_images_where_they_are(tiny_model, processor):
    text, images = ROWS[0]
    inputs = processor(text=[text], images=[images], return_tensors="pt")
    embeddings = tiny_model.get_input_embeddings()(inputs["input_ids"])
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = tiny_model.generate(**inputs, **options)[:, length:]
    assert torch.equal(tiny_model.generate(**inputs, inputs_embeds=embeddings, **options)[:, length:], expected)
    del inputs["input_ids"]
    assert torch.equal(tiny_model.generate(**inputs, inputs_embeds=embeddings, **options), expected)


@pytest.mark.parametrize("size", [16, 1000])
def test_a_prompt_read_in_pieces_gives_the_same_or_is_refused(tiny_model, processor, size):
    expected = generate(tiny_model, processor, ROWS[:1])
    if size == 16 and not IS_TRANSFORMERS_5:
        with pytest.raises(ValueError, match=r"prefill_chunk_size is 16 and the prompt has \d+ tokens"):
            generate(tiny_model, processor, ROWS[:1], prefill_chunk_size=size)
    else:
        assert generate(tiny_model, processor, ROWS[:1], prefill_chunk_size=size) == expected
    text = [(PROMPT.format("How many dogs are there? " * 8), [])]
    assert generate(tiny_model, processor, text, prefill_chunk_size=size) == generate(tiny_model, processor, text)


def test_features_encoded_before_repeat_with_their_rows(tiny_model, processor):
    texts, images = [text for text, _ in ROWS], [shown for _, shown in ROWS]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    features = tiny_model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_sizes"))
    options = {"num_beams": 3, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    generated = tiny_model.generate(**inputs, mm_encoder_outputs={"image": features}, **options)
    assert generated[:, inputs["input_ids"].shape[1] :].tolist() == generate(tiny_model, processor, ROWS, num_beams=3)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_prompt_read_group_by_group_equals_one_read_at_once(
    tiny_model, processor, monkeypatch, window, has_positions, kind
):
    """Logits, every entry of the cache that is not padding, and the logits of a step after it."""
    texts, images = [text for text, _ in ROWS], [shown for _, shown in ROWS]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    mask = inputs["attention_mask"]
    if has_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    monkeypatch.setattr(tiny_model.config.text_config, "sliding_window", window)
    lengths: list[tuple[int, ...]] = []
    handle = tiny_model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )

    def read(**options: bool) -> list[torch.Tensor]:
        length = {"max_cache_len": mask.shape[1] + 1} if kind is StaticCache else {}
        cache = kind(config=tiny_model.config.text_config, **length)
        with torch.no_grad():
            logits = tiny_model(**inputs, past_key_values=cache, use_cache=True, **options).logits
            longer = torch.cat([mask, mask[:, -1:]], dim=1)
            step = {"position_ids": longer.sum(-1, keepdim=True) - 1} if has_positions else {}
            after = tiny_model(torch.full_like(mask[:, -1:], 7), attention_mask=longer, past_key_values=cache, **step)
        return [logits[mask.bool()], after.logits, *(kept(layer.keys) for layer in cache.layers)]

    def kept(states: torch.Tensor) -> torch.Tensor:
        last = torch.cat([mask, mask[:, -1:]], dim=1)[:, -states.shape[2] :]
        return states.transpose(1, 2)[last.bool()]

    apart = read()
    num_groups = len(lengths) - 1
    together = read(output_hidden_states=True)  # which keeps all rows together
    handle.remove()
    assert num_groups > 1
    assert sum(rows * length for rows, length in lengths[:num_groups]) < 0.75 * mask.numel()
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


WINDOWED_ROWS = [ROWS[3], ROWS[0]]  # of like length: too little padding for groups


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("gives", ["a cache", "no cache", "no use of one"])
def test_a_prompt_read_a_window_at_a_time_equals_one_read_at_once(
    tiny_model, processor, monkeypatch, has_positions, gives, attention
):
    """Logits, the cache, and the logits of a step after it; most tokens meet one window and their block."""
    row = (PROMPT.format("<image> and <image>?"), ROWS[2][1][:2])
    texts, images = zip(*[ROWS[3], row], strict=True)
    inputs = dict(processor(text=list(texts), images=list(images), padding=True, return_tensors="pt"))
    mask, window = inputs["attention_mask"], 30
    assert 0 < (mask == 0).sum() < 0.25 * mask.numel()
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) if has_positions else None
    monkeypatch.setattr(tiny_model.config.text_config, "sliding_window", window)
    monkeypatch.setattr(tiny_model.config.text_config, "_attn_implementation_internal", attention)
    monkeypatch.setitem(tiny_model.prepare_inputs_for_generation.__func__.__globals__, "SMALLEST_BLOCK", 8)
    lengths: list[int] = []
    handle = tiny_model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def read(**options: bool) -> list[torch.Tensor]:
        cache = DynamicCache(config=tiny_model.config.text_config) if gives == "a cache" else None
        options |= {"use_cache": gives != "no use of one", CACHE_NAME: cache}
        with torch.no_grad():
            outputs = tiny_model(**inputs, **options)
            cache = outputs[CACHE_NAME] if options["use_cache"] else None
            if cache is None:
                assert getattr(outputs, CACHE_NAME) is None
                return [outputs.logits[mask.bool()]]
            longer = torch.cat([mask, mask[:, -1:]], dim=1)
            step = {"position_ids": longer.sum(-1, keepdim=True) - 1} if has_positions else {}
            step |= {"attention_mask": longer, CACHE_NAME: cache}
            after = tiny_model(torch.full_like(mask[:, -1:], 7), **step).logits
        assert {layer.keys.shape[2] for layer in cache.layers} == {window - 1}
        return [outputs.logits[mask.bool()], after, *(layer.values for layer in cache.layers)]

    in_blocks = read()
    blocks = lengths[: list(accumulate(lengths)).index(mask.shape[1]) + 1]
    assert blocks[0] == window - 1
    assert max(blocks[1:]) - min(blocks[1:]) <= 1
    assert 0.5 * window / 2 < blocks[1] < 1.5 * window / 2
    del lengths[:]
    at_once = read(output_hidden_states=True)  # which keeps the prompt together
    handle.remove()
    assert lengths[0] == mask.shape[1]
    for one, other in zip(in_blocks, at_once, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_long_row_beside_short_ones_is_read_a_window_at_a_time(
    tiny_model, processor, monkeypatch, has_positions, kind
):
    """As it is when it comes alone: logits, what the cache keeps of it, and the logits of steps after it."""
    texts, images = [text for text, _ in ROWS], [shown for _, shown in ROWS]
    inputs = dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))
    mask, window = inputs["attention_mask"], 30
    monkeypatch.setattr(tiny_model.config.text_config, "sliding_window", window)
    monkeypatch.setitem(tiny_model.prepare_inputs_for_generation.__func__.__globals__, "SMALLEST_BLOCK", 8)
    lengths: list[tuple[int, ...]] = []
    handle = tiny_model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )

    def read(mask: torch.Tensor, inputs: dict) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        room = {"max_cache_len": mask.shape[1] + 2} if kind is StaticCache else {}
        cache = kind(config=tiny_model.config.text_config, **room)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            first = {"position_ids": positions} if has_positions else {}
            logits = [tiny_model(**inputs, **first, use_cache=True, **{CACHE_NAME: cache}).logits[:, -1:]]
            for step in (1, 2):
                longer = torch.cat([mask, mask[:, -1:].expand(-1, step)], dim=1)
                place = {"position_ids": positions[:, -1:] + step} if has_positions else {}
                place |= {"attention_mask": longer, CACHE_NAME: cache}
                logits.append(tiny_model(torch.full_like(mask[:, -1:], 7), **place).logits)
        return logits, [layer.keys[:, :, 1 - window :] for layer in cache.layers]

    def alone(row: int) -> dict:
        first = sum(len(shown) for shown in images[:row])
        own = range(first, first + len(images[row]))
        return {
            name: tensor[own] if name in ("pixel_values", "image_sizes") else tensor[[row]][:, mask[row].bool()]
            for name, tensor in inputs.items()
        }

    logits, kept = read(mask, inputs)
    longest = [shape for shape in lengths if shape[1] > 1 and shape[0] == 1][:2]
    assert longest[0] == (1, window - 1)
    assert max(length for _, length in lengths) < mask.shape[1]
    for row in (1, 2) if has_positions else (2,):  # without positions, padding counts
        logits_alone, kept_alone = read(mask[[row]][:, mask[row].bool()], alone(row))
        for one, other in zip(logits, logits_alone, strict=True):
            torch.testing.assert_close(one[[row]], other, atol=2e-5, rtol=1e-4)
        if row == 2:
            for one, other in zip(kept, kept_alone, strict=True):
                torch.testing.assert_close(one[[row]], other, atol=2e-5, rtol=1e-4)
    handle.remove()


@pytest.mark.parametrize("window", [None, 30])
def test_generate_continues_a_prompt_read_a_window_at_a_time(tiny_model, processor, monkeypatch, window):
    monkeypatch.setattr(tiny_model.config.text_config, "sliding_window", window)
    at_once = generate(tiny_model, processor, WINDOWED_ROWS)
    monkeypatch.setitem(tiny_model.prepare_inputs_for_generation.__func__.__globals__, "SMALLEST_BLOCK", 8)
    lengths: list[int] = []
    handle = tiny_model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert generate(tiny_model, processor, WINDOWED_ROWS) == at_once
    handle.remove()
    assert (lengths[0] == 29 and 1 < lengths[1] < 29) == (window == 30)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_reads_a_mixed_batch_group_by_group(tiny_model, processor, cache):
    lengths: list[tuple[int, ...]] = []
    handle = tiny_model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    generate(tiny_model, processor, ROWS, cache_implementation=cache, disable_compile=True)
    handle.remove()
    prompts = [shape for shape in lengths if shape[1] > 1]
    assert len(prompts) > 1
    assert sum(rows for rows, _ in prompts) == len(ROWS)


@pytest.mark.parametrize(
    ("mask", "groups"),
    [
        pytest.param([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], [[1], [0, 2]], id="left padding"),
        pytest.param([[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], [], id="right padding"),
        pytest.param([[0, 1, 1, 1], [1, 1, 1, 1]], [], id="little padding"),
        pytest.param([[0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], [], id="a hole"),
        pytest.param([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], [], id="an empty row"),
        pytest.param([[1, 1, 1, 1]], [], id="one row"),
    ],
)
def test_rows_are_grouped_where_padding_is_on_the_left_and_much(mask, groups):
    assert group_rows_by_length(torch.tensor(mask), most_tokens=4) == groups


@pytest.mark.parametrize(
    ("most_tokens", "groups"), [(8, [[1, 2], [0, 3, 4]]), (7, [[1], [2], [0, 3, 4]]), (2, [[1], [2], [0, 3], [4]])]
)
def test_a_group_holds_no_more_tokens_than_fit(most_tokens, groups):
    lengths = (1, 4, 4, 1, 1)
    mask = torch.tensor([[0] * (4 - length) + [1] * length for length in lengths])
    assert group_rows_by_length(mask, most_tokens) == groups


@pytest.mark.parametrize(("device", "runs"), [("cpu", [(1, 4), (2, 1)]), ("meta", [(3, 4)])])
def test_rows_are_read_apart_on_a_cpu_alone(device, runs):
    """On a GPU it was never measured to be faster. The decoder here has no layers, and the device no values."""
    shapes = []

    class Decoder:
        rotary_emb = SimpleNamespace(rope_type="default")

        def __call__(self, inputs_embeds, **kwargs):
            shapes.append(tuple(inputs_embeds.shape[:2]))
            return BaseModelOutputWithPast(last_hidden_state=inputs_embeds, **{CACHE_NAME: kwargs[CACHE_NAME]})

    mask = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    with torch.no_grad():
        outputs = run_decoder(Decoder(), torch.zeros(3, 4, 2, device=device), mask, None, DynamicCache())
    assert shapes == runs
    assert outputs.last_hidden_state.shape == (3, 4, 2)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 7])
def test_a_cache_that_grows_in_place_holds_what_transformers_does(monkeypatch, window):
    """Through rooms that fill up, several tokens at once, replaced tensors, other modes and copies."""
    ours, theirs = growing_layer(window), plain_layer(window)
    monkeypatch.setattr(type(ours), "room", 3)
    generator = torch.Generator().manual_seed(0)
    copies, given = [], []
    for step, length in enumerate([5, 1, 1, 1, 1, 2, 1, 4, 1, 1, 1, 3, 1, 1, 1]):
        keys, values = torch.randn(2, 2, 3, length, 4, generator=generator)
        with torch.inference_mode(step in (5, 6)):
            pairs = [layer.update(keys, values) for layer in (ours, theirs)]
        for mine, other in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)
        assert ours.get_seq_length() == theirs.get_seq_length()
        given.append((pairs[0][0], pairs[0][0].clone()))
        if step == 8:
            for layer in (ours, theirs):
                layer.reorder_cache(torch.tensor([1, 0]))
        if step in (3, 10):
            copies.append((copy.deepcopy(ours), copy.deepcopy(theirs)))
    for mine, other in copies:  # a copy goes its own way
        keys = torch.randn(2, 3, 1, 4, generator=generator)
        for one, another in zip(mine.update(keys, keys), other.update(keys, keys), strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=0)
    for tensor, before in given:
        torch.testing.assert_close(tensor, before, rtol=0, atol=0)


def test_generate_copies_its_cache_once_in_a_room_of_tokens(tiny_model, processor, monkeypatch):
    answer = tiny_model.generate(torch.full((1, 3), 300), max_new_tokens=1, return_dict_in_generate=True)
    kind, extended, memories = type(answer.past_key_values.layers[0]), [], set()
    extend = kind._extend

    def watched(self, name, new):
        whole = extend(self, name, new)
        extended.append(name)
        memories.add((id(self), name, getattr(self, name).untyped_storage().data_ptr()))
        return whole

    monkeypatch.setattr(kind, "_extend", watched)
    generate(tiny_model, processor, ROWS, max_new_tokens=100, min_new_tokens=100)
    num_layers = tiny_model.config.text_config.num_hidden_layers
    assert len(extended) == 2 * num_layers * 99
    assert len(memories) <= 2 * num_layers * 2


def plain_layer(window):
    return DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)


def growing_layer(window):
    """The layer that `generate` puts in place of transformers' own."""
    cache = DynamicCache()
    cache.layers = [plain_layer(window)]
    grow_in_place(cache)
    assert type(cache.layers[0]) is not type(plain_layer(window))
    return cache.layers[0]
