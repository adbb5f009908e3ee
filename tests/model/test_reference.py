# SPDX-License-Identifier: Apache-2.0
"""The reference's numbers through the public classes: converter -> from_pretrained -> image processor -> model.

Observed worst cases, float32 on two CPU cores, both transformers lines: vision 2e-6, resampler 7e-6, logits 5e-5.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from blip3.conversion.names import to_released
from support import SHARED, convert, load_model, needs_reference

pytestmark = needs_reference

FIXTURES = SHARED / "reference" / "fixtures"
CASES = sorted(path.name for path in FIXTURES.glob("cases/*")) if FIXTURES.is_dir() else []
INFERENCE_CASES = [name for name in CASES if name != "train_step"]
FEATURE_TOLERANCE, LOGIT_TOLERANCE = 5e-5, 2e-4


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "converted"
    source = FIXTURES / "model"
    convert(source, output, "--vision-config", source / "siglip_vision_config.json", "--verify")
    return output


class Case:
    """One fixture case: its arrays, and the model inputs our own processor and converter make of it."""

    def __init__(self, name: str, repo: Path):
        folder = FIXTURES / "cases" / name
        self.facts = json.loads((folder / "case.json").read_text())
        self.arrays = dict(np.load(folder / "arrays.npz"))
        self.special_ids = json.loads((FIXTURES / "model" / "tiny_meta.json").read_text())["special_ids"]
        window = self.facts.get("text_config_overrides", {}).get("sliding_window")
        self.model = load_model(repo).eval() if window is None else self._model_with_window(repo, window)
        image_folder = FIXTURES / "cases" / self.facts.get("images_in_case", name)
        images = [Image.open(path) for path in sorted(image_folder.glob("image_*.png"))]
        self.is_base = self.facts["variant"].startswith("base")
        processor = AutoImageProcessor.from_pretrained(repo, trust_remote_code=True)
        self.images = {}
        if images:
            self.images = dict(processor(images, return_tensors="pt", do_image_splitting=not self.is_base))
        self.num_latents = self.model.config.resampler_config.num_latents
        count = self.model.model.count_image_tokens
        self.image_tokens = [count(tuple(size)) for size in self.images.get("image_sizes", torch.empty(0, 2)).tolist()]

    @staticmethod
    def _model_with_window(repo: Path, window: int):
        config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
        config.text_config.sliding_window = window + 1  # newer transformers count the query's own position
        return load_model(repo, config=config).eval()

    def expand(self, ids: np.ndarray, labels: np.ndarray | None = None) -> tuple[list[int], list[int]]:
        """Write each `<image>` as its run of image tokens and leave the base release's fillers out."""
        expanded, expanded_labels = [], []
        for token, label in zip(ids.tolist(), (ids if labels is None else labels).tolist(), strict=True):
            is_image = token == self.special_ids["image"]
            if token == self.special_ids["placeholder"]:
                continue
            length = next(self.image_lengths) if is_image else 1
            expanded += [token] * length
            expanded_labels += [-100 if is_image else label] * length
        return expanded, expanded_labels

    def inputs(self, side: str = "left") -> dict[str, torch.Tensor]:
        """The batch our processor would hand to the model."""
        self.image_lengths = iter(self.image_tokens)
        labels = self.arrays.get("labels", [None] * len(self.arrays["input_ids"]))
        rows = [
            self.expand(ids[mask == 1], None if row is None else row[mask == 1])
            for ids, mask, row in zip(self.arrays["input_ids"], self.arrays["attention_mask"], labels, strict=True)
        ]
        length = max(len(ids) for ids, _ in rows)

        def pad(row: list[int], value: int) -> list[int]:
            fill = [value] * (length - len(row))
            return fill + row if side == "left" else row + fill

        batch = {
            "input_ids": torch.tensor([pad(ids, self.special_ids["pad"]) for ids, _ in rows]),
            "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
        }
        if "labels" in self.arrays:
            batch["labels"] = torch.tensor([pad(row, -100) for _, row in rows])
        return batch | self.images


@pytest.fixture(scope="module")
def load_case(repo):
    """Load each inference case once; its tests only read it."""
    return lru_cache(maxsize=None)(lambda name: Case(name, repo))


@pytest.fixture(params=INFERENCE_CASES)
def case(request, load_case):
    return load_case(request.param)


def worst(ours: torch.Tensor, reference: np.ndarray) -> float:
    return float(np.abs(ours.detach().numpy() - reference).max())


def test_all_sixteen_cases_are_present():
    assert len(CASES) == 16


def test_tiles_are_bit_exact(case):
    if "tiles_u8" not in case.arrays:
        pytest.skip("this case records no tiles")
    reference = torch.from_numpy(case.arrays["tiles_u8"])
    reference = reference.reshape(-1, *reference.shape[-3:])
    counts = [tokens // case.num_latents for tokens in case.image_tokens]
    ours = torch.cat([image[:n] for image, n in zip(case.images["pixel_values"], counts, strict=True)])
    assert torch.equal(ours, (reference.float() / 255 - 0.5) / 0.5)
    if "pixel_values" in case.arrays:
        assert np.array_equal(ours.numpy(), case.arrays["pixel_values"].reshape(ours.shape))


@torch.no_grad()
def test_vision_and_resampler_features(case):
    if not case.images:
        pytest.skip("this case has no images")
    features = case.model.get_image_features(**case.images)
    if "vision_features" in case.arrays:
        reference = case.arrays["vision_features"]
        assert (
            worst(features.last_hidden_state, reference.reshape(features.last_hidden_state.shape)) < FEATURE_TOLERANCE
        )
    ours = torch.cat(features.pooler_output)
    reference = case.arrays["resampler_out"]
    assert worst(ours, reference.reshape(-1, reference.shape[-1])) < FEATURE_TOLERANCE


@torch.no_grad()
def test_prefill_logits(case):
    inputs = case.inputs()
    logits = case.model(**inputs).logits
    assert worst(logits[:, -1], case.arrays["last_logits"]) < LOGIT_TOLERANCE
    if "logits" in case.arrays:
        assert_logits_agree(logits, inputs, case)
    kept = case.model(**inputs, logits_to_keep=1).logits
    assert kept.shape[1] == 1
    assert worst(kept[:, -1], case.arrays["last_logits"]) < LOGIT_TOLERANCE


@torch.no_grad()
def test_a_long_prompt_read_a_window_at_a_time_gives_the_logits_of_the_reference(load_case, monkeypatch):
    case, lengths = load_case("anyres_long_sliding_window"), []
    monkeypatch.setitem(case.model.prepare_inputs_for_generation.__func__.__globals__, "SMALLEST_BLOCK", 1)
    handle = case.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    test_prefill_logits(case)
    test_greedy_ids_are_exact(case)
    handle.remove()
    window = case.facts["text_config_overrides"]["sliding_window"]
    assert max(lengths) == window  # earlier keys of the reference; what transformers calls the window counts one more
    assert lengths.count(window) >= 3
    assert sum(length > 1 for length in lengths) > 2 * lengths.count(window)  # more blocks behind the first


def assert_logits_agree(logits: torch.Tensor, inputs: dict, case: Case) -> None:
    """Compare the real tokens of each row; the reference pads rows further than needed."""
    ours = inputs["attention_mask"].bool()
    reference = case.arrays.get("expanded_attention_mask", case.arrays["attention_mask"]) == 1
    assert ours.sum(-1).tolist() == reference.sum(-1).tolist()
    assert worst(logits[ours], case.arrays["logits"][reference]) < LOGIT_TOLERANCE


def test_greedy_ids_are_exact(case):
    inputs = case.inputs()
    length = inputs["input_ids"].shape[1]
    extra = {}
    if "repetition_penalty" in case.facts:  # the reference penalises new ids only: it has no prompt ids
        penalty = RepetitionPenaltyLogitsProcessor(case.facts["repetition_penalty"], prompt_ignore_length=length)
        extra["logits_processor"] = LogitsProcessorList([penalty])
    generated = case.model.generate(
        **inputs,
        **extra,
        do_sample=False,
        max_new_tokens=case.facts["max_new_tokens"],
        eos_token_id=case.facts["eos_token_id"],
        pad_token_id=case.facts["pad_token_id"],
    )
    assert generated[:, length:].tolist() == case.arrays["generated_ids"].tolist()


def test_greedy_ids_from_embeddings_are_exact(case):
    inputs = case.inputs()
    inputs["inputs_embeds"] = case.model.get_input_embeddings()(inputs.pop("input_ids"))
    options = {name: case.facts[name] for name in ("max_new_tokens", "eos_token_id", "pad_token_id")}
    options |= {"repetition_penalty": case.facts["repetition_penalty"]} if "repetition_penalty" in case.facts else {}
    generated = case.model.generate(**inputs, **options, do_sample=False)
    assert generated.tolist() == case.arrays["generated_ids"].tolist()


def reference_name(name: str) -> str:
    """Our parameter name under the release's, without `vlm.`; folded rows keep the big matrix's name."""
    return to_released(name).removeprefix("vlm.")


@pytest.fixture
def train_case(repo):
    case = Case("train_step", repo)
    case.model.train()
    case.model.model.vision_tower.requires_grad_(False)
    return case


def test_training_loss_and_gradients(train_case):
    model, arrays = train_case.model, train_case.arrays
    inputs = train_case.inputs("right")
    output = model(**inputs)
    output.loss.backward()
    assert abs(output.loss.item() - float(arrays["loss"])) < 1e-4
    assert_logits_agree(output.logits, inputs, train_case)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    squares: dict[str, float] = {}
    for name, norm in train_case.facts["grad_norms"].items():
        big = name.replace("additional_embedding.", "").replace("lm_head.additional_fc.", "lm_head.")
        squares[big] = squares.get(big, 0.0) + norm**2
    compared = 0
    for name, gradient in ours.items():
        reference = squares[reference_name(name)] ** 0.5
        assert gradient.norm().item() == pytest.approx(reference, rel=1e-3, abs=1e-6), name
        compared += 1
    assert compared == len(squares) > 50
    num_kept = model.config.image_token_id
    assert np.allclose(ours["model.resampler.latents"], arrays["grad/vision_tokenizer.latents"], atol=1e-5)
    extra_rows = arrays["grad/lang_model.lm_head.additional_fc.weight"]
    assert np.allclose(ours["lm_head.weight"][num_kept:], extra_rows, atol=1e-5)
    assert np.allclose(ours["lm_head.bias"][:num_kept], arrays["grad/lang_model.lm_head.bias"][:num_kept], atol=1e-5)
    total = sum(gradient.norm() ** 2 for gradient in ours.values()) ** 0.5
    assert total.item() == pytest.approx(train_case.facts["total_grad_norm"], rel=1e-3)


def test_adamw_trajectory(train_case):
    model, settings = train_case.model, train_case.facts["adamw"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    losses, norms = [], []
    for _ in range(settings["steps"]):
        loss = model(**train_case.inputs("right")).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, settings["clip"]).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(train_case.facts["adamw_losses"], abs=2e-3)
    assert norms == pytest.approx(train_case.facts["adamw_grad_norms"], rel=2e-3)
