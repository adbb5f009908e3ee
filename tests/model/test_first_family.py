# SPDX-License-Identifier: Apache-2.0
"""The first family (r-v1): converter, processor and model against what its own code gave for two tiny models.

The reference reads padding and answers as text queries. Each row is compared with what the reference gave for it
alone; where only a padded number exists, the padding is handed to the model as the reference read it.
Observed worst cases, float32, both transformers lines: vision 2e-6, resampler 6e-6, logits 3e-5.
"""

import hashlib
import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, RepetitionPenaltyLogitsProcessor

from blip3.conversion.names import to_released
from blip3.conversion.sources import open_reader, released_views
from blip3.conversion.tensors import views_of
from blip3.conversion.towers import to_open_clip
from blip3.hub import model_code
from support import SHARED, convert, load_model, needs_reference

pytestmark = needs_reference

FIXTURES = SHARED / "reference" / "fixtures_v1"
CASES = sorted(path.name for path in FIXTURES.glob("cases/*")) if FIXTURES.is_dir() else []
TRAIN_CASES = [name for name in CASES if "train" in name]
FEATURE_TOLERANCE, LOGIT_TOLERANCE = 5e-5, 2e-4
PADDED_ALONE = "instruct_left_padding_alone"  # its padding is the case

Blip3Processor = model_code("processing_blip3.Blip3Processor")
Blip3ImageProcessor = model_code("image_processing_blip3.Blip3ImageProcessor")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Both tiny models, converted."""
    output = tmp_path_factory.mktemp("first_family")
    for variant in ("base", "instruct"):
        convert(FIXTURES / f"model_{variant}", output / variant, "--verify")
    return output


def build_tokenizer(special: dict[str, int], num_ids: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which the fixtures' ids are words: `t5` is 5, and the markers stand at their own ids."""
    words = {f"t{index}": index for index in range(num_ids)}
    markers = {"assistant": "<|assistant|>", "end": "<|end|>", "pad": "<pad>", "image": "<image>"}
    markers["placeholder"] = "<image placeholder>"
    words |= {marker: words.pop(f"t{special[name]}") for name, marker in markers.items()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(marker, rstrip=True, normalized=False) for marker in markers.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="t0", padding_side="left")


class Case:
    """One case: the reference's arrays, our model, and what our processor makes of its prompts and images."""

    def __init__(self, name, folders):
        folder = FIXTURES / "cases" / name
        self.facts = json.loads((folder / "case.json").read_text())
        self.arrays = dict(np.load(folder / "arrays.npz"))
        self.is_base = "base" in self.facts["variant"]
        source = FIXTURES / ("model_base" if self.is_base else "model_instruct")
        meta = json.loads((source / "tiny_meta.json").read_text())
        self.special = meta["special_ids"]
        repository = folders / source.name.removeprefix("model_")
        self.model = load_model(repository).eval()
        self.processor = Blip3Processor(
            Blip3ImageProcessor.from_pretrained(repository),
            build_tokenizer(self.special, meta["n_logits"]),
            num_latents=self.model.config.resampler_config.num_latents,
            num_text_queries=self.model.config.resampler_config.num_text_queries,
        )
        image_folder = FIXTURES / "cases" / self.facts.get("images_in_case", name)
        self.images = [Image.open(path) for path in sorted(image_folder.glob("image_*.png"))]

    def rows(self):
        """The ids of each row without padding."""
        pairs = zip(self.arrays["input_ids"], self.arrays["attention_mask"], strict=True)
        return [ids[mask == 1].tolist() for ids, mask in pairs]

    def inputs(self, side="left"):
        words = [self.processor.tokenizer.convert_ids_to_tokens(row) for row in self.rows()]
        texts = [" ".join(row).replace(" <image placeholder>", "<image placeholder>") for row in words]
        options = {"images": self.images} if self.images else {}
        return dict(self.processor(text=texts, padding=True, padding_side=side, return_tensors="pt", **options))

    def reference_queries(self):
        """What the reference reads as text queries: the rows as they are padded, answers included."""
        rows = torch.from_numpy(self.arrays["input_ids"])[:, :256]
        return rows[torch.tensor(self.facts.get("image_row", range(len(rows))))]

    def reference(self, name):
        """A number of the reference for rows alone, if padding changed it."""
        return self.arrays.get(f"alone_{name}", self.arrays.get(name))

    def alone_ids(self):
        return self.facts.get("alone_generated_ids", self.arrays["generated_ids"].tolist())


@pytest.fixture(scope="module")
def load_case(folders):
    return lru_cache(maxsize=None)(lambda name: Case(name, folders))


@pytest.fixture(params=[name for name in CASES if name not in (*TRAIN_CASES, PADDED_ALONE, "instruct_batch_stop")])
def case(request, load_case):
    return load_case(request.param)


def worst(ours: torch.Tensor, reference: np.ndarray) -> float:
    return float(np.abs(ours.detach().numpy() - reference).max())


def test_all_twenty_cases_are_present():
    assert len(CASES) == 20


def test_the_processor_gives_the_ids_and_queries_of_the_reference(case):
    inputs = case.inputs()
    real = inputs["attention_mask"].bool()
    collapsed = []
    for ids, mask in zip(inputs["input_ids"], real, strict=True):
        assert mask.sum() + (~mask).sum() == len(ids)
        collapsed.append(ids[mask].tolist())
    if case.is_base:
        image, placeholder = case.special["image"], case.special["placeholder"]
        expected = [[image if token == placeholder else token for token in row] for row in case.rows()]
        assert collapsed == expected
        assert "query_ids" not in inputs
    elif case.images:
        queries = inputs["query_ids"]
        assert queries.shape == (len(case.images), 256)
        own = [row[row >= 0].tolist() for row in queries]
        rows = case.rows()
        assert own == [rows[row][:256] for row in case.facts["image_row"]]
    else:
        assert "query_ids" not in inputs


def test_tiles_are_bit_exact(case):
    if "tiles_u8" not in case.arrays:
        pytest.skip("this case records no tiles")
    inputs = case.inputs()
    reference = torch.from_numpy(case.arrays["tiles_u8"])
    reference = reference.reshape(-1, *reference.shape[-3:])
    sizes = inputs["image_sizes"].tolist()
    counts = [case.processor.count_image_tokens(tuple(size)) // case.processor.num_latents for size in sizes]
    ours = torch.cat([image[:n] for image, n in zip(inputs["pixel_values"], counts, strict=True)])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics(case))
    assert torch.equal(ours, (reference.float() / 255 - mean) / std)


def statistics(case):
    return case.processor.image_processor.image_mean, case.processor.image_processor.image_std


@torch.no_grad()
def test_vision_and_resampler_features(case):
    if not case.images:
        pytest.skip("this case has no images")
    inputs = case.inputs()
    names = [name for name in ("pixel_values", "image_sizes", "query_ids") if name in inputs]
    features = case.model.get_image_features(**{name: inputs[name] for name in names})
    if "vision_features" in case.arrays:
        assert worst(features.last_hidden_state, case.arrays["vision_features"]) < FEATURE_TOLERANCE
    reference = case.reference("resampler_out")
    assert worst(torch.cat(features.pooler_output), reference.reshape(-1, reference.shape[-1])) < FEATURE_TOLERANCE


@torch.no_grad()
def test_prefill_logits(case):
    inputs = case.inputs()
    logits = case.model(**inputs).logits
    assert worst(logits[:, -1], case.reference("last_logits")) < LOGIT_TOLERANCE
    if "logits" in case.arrays:
        mask = case.arrays.get("expanded_attention_mask", case.arrays["attention_mask"]) == 1
        ours = logits[inputs["attention_mask"].bool()]
        assert worst(ours, case.arrays["logits"][mask]) < LOGIT_TOLERANCE


@pytest.mark.parametrize("from_embeddings", [False, True])
def test_greedy_ids_are_exact(case, from_embeddings):
    assert generate(case, case.inputs(), from_embeddings) == case.alone_ids()


def generate(case, inputs, from_embeddings=False, **options):
    length = 0 if from_embeddings else inputs["input_ids"].shape[1]
    if case.facts.get("repetition_penalty"):  # of the new ids only
        penalty = RepetitionPenaltyLogitsProcessor(case.facts["repetition_penalty"], prompt_ignore_length=length)
        options["logits_processor"] = LogitsProcessorList([penalty])
    if from_embeddings:
        inputs["inputs_embeds"] = case.model.get_input_embeddings()(inputs.pop("input_ids"))
    options |= {name: case.facts[name] for name in ("max_new_tokens", "eos_token_id", "pad_token_id")}
    return case.model.generate(**inputs, **options, do_sample=False)[:, length:].tolist()


@pytest.mark.parametrize("name", ["instruct_batch_same_grid", "instruct_batch_stop", PADDED_ALONE])
def test_padding_as_queries_gives_the_batched_numbers_of_the_reference(name, load_case):
    """The reference's batches, by handing the model the padding that it read; our processor leaves it out."""
    case = load_case(name)
    inputs = case.inputs() | {"query_ids": case.reference_queries()}
    if "last_logits" in case.arrays:
        with torch.no_grad():
            assert worst(case.model(**inputs).logits[:, -1], case.arrays["last_logits"]) < LOGIT_TOLERANCE
    assert generate(case, inputs) == case.arrays["generated_ids"].tolist()


def test_padding_changes_nothing_for_our_processor(load_case):
    padded, plain = load_case(PADDED_ALONE), load_case("instruct_square_2x2")
    inputs = padded.inputs()
    assert torch.equal(inputs["query_ids"], plain.inputs()["query_ids"])
    assert generate(padded, inputs) == plain.arrays["generated_ids"].tolist()


@pytest.mark.parametrize("name", TRAIN_CASES)
def test_training_loss_and_gradients(name, load_case, folders):
    """The reference's step, with the answers among the text queries as it has them."""
    case = load_case(name)
    model, arrays = load_model(folders / "instruct"), case.arrays
    model.train()
    model.model.vision_tower.requires_grad_(False)
    inputs = expanded_step(case)
    with torch.no_grad():
        loss = model(**inputs).loss.item()
    assert abs(loss - case.facts["loss_with_positions_that_skip_masked_vectors"]) < 1e-4
    output = model(**inputs, position_ids=reference_positions(case, inputs["input_ids"].shape[1]))
    assert abs(output.loss.item() - case.facts["loss"]) < 1e-4
    output.loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    squares: dict[str, float] = {}
    for released, norm in case.facts["grad_norms"].items():
        big = released.replace("additional_embedding.", "").replace("lm_head.additional_fc.", "lm_head.")
        squares[big] = squares.get(big, 0.0) + norm**2
    assert {to_released(name) for name in ours} == set(squares)
    for own, gradient in ours.items():
        # a look-up with padding_idx gives the row of <pad> no gradient, the reference's gives it one
        tolerance = 5e-3 if own.endswith("embed_tokens.weight") else 1e-3
        assert gradient.norm().item() == pytest.approx(squares[to_released(own)] ** 0.5, rel=tolerance, abs=1e-6), own
    latents, projection = arrays["grad/vision_tokenizer.latents"], "grad/vision_tokenizer.text_projection.2.weight"
    assert np.allclose(ours["model.resampler.latents"], latents, atol=1e-5)
    assert np.allclose(ours["model.resampler.text_projection.2.weight"], arrays[projection], atol=1e-5)


def reference_positions(case, length):
    """Positions that count the vectors which the reference puts into short rows and masks."""
    positions = torch.zeros(len(case.arrays["input_ids"]), length, dtype=torch.long)
    for row, mask in zip(positions, case.arrays["expanded_attention_mask"], strict=True):
        real = torch.from_numpy(mask).nonzero().flatten()
        row[: len(real)] = real
    return positions


def expanded_step(case):
    """The batch of a training case: our processor's on the right, the reference's labels and queries."""
    rows, labels = case.rows(), case.arrays["labels"]
    inputs = case.inputs("right")
    image = case.special["image"]
    wanted = torch.full_like(inputs["input_ids"], -100)
    for row, (ids, own) in enumerate(zip(rows, labels, strict=True)):
        num_added = int((inputs["input_ids"][row] == image).sum()) - ids.count(image)
        behind = torch.tensor(own[ids.index(image) + 1 : len(ids)])
        start = ids.index(image) + 1 + num_added
        wanted[row, start : start + len(behind)] = behind
    return inputs | {"labels": wanted, "query_ids": case.reference_queries()}


def test_answers_are_no_queries_in_training(load_case):
    case = load_case("instruct_train_step")
    rows, start = case.rows(), case.special["assistant"]
    own = [row[row >= 0].tolist() for row in case.inputs("right")["query_ids"]]
    assert own == [row[: row.index(start) + 1] for row in rows]


def test_real_sizes_are_cut_as_the_reference_cuts_them():
    processor = Blip3ImageProcessor(
        size={"height": 378, "width": 378},
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    for expected in json.loads((FIXTURES / "preprocess_378" / "expected.json").read_text()):
        image = Image.open(FIXTURES / "preprocess_378" / expected["file"]).convert(expected["mode"])
        pixels = processor(image, return_tensors="pt")["pixel_values"][0][: expected["n_tiles"]].contiguous()
        assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == expected["pixel_values_sha256"]
        alone = processor(image, return_tensors="pt", do_image_splitting=False)["pixel_values"][0][0].contiguous()
        assert hashlib.sha256(alone.numpy().tobytes()).hexdigest() == expected["base_res_sha256"]


def test_grids_of_three_hundred_sizes():
    choose_grid, grids = model_code("tiling_blip3.choose_grid"), model_code("configuration_blip3.RELEASED_TILE_GRIDS")
    for width, height, grid_width, grid_height in json.loads((FIXTURES / "grid_table_378.json").read_text())["rows"]:
        assert choose_grid((height, width), grids, 378) == (grid_height // 378, grid_width // 378)


@pytest.mark.parametrize("variant", ["base", "instruct"])
def test_open_clip_names_come_back_bit_for_bit(variant, folders, tmp_path):
    convert(folders / variant, tmp_path / "back", "--to-original", "--verify")
    original, back = (open_reader(path) for path in (FIXTURES / f"model_{variant}", tmp_path / "back"))
    assert set(original.specs) == set(back.specs)
    for name, spec in original.specs.items():
        assert torch.equal(original.read(name, 0, spec.shape[0]), back.read(name, 0, spec.shape[0])), name
    views = released_views(original, "a release")
    assert set(to_open_clip(views)) == {name.removeprefix("vlm.") for name in views_of(original)}
