# SPDX-License-Identifier: Apache-2.0
"""Quantized by torchao and bitsandbytes on the CPU, on the small model: what changes, and by how much.

python -m pytest -o addopts= -rP tests/serving/test_quantization.py      prints the agreement of each kind
"""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

from blip3.conversion.quantized import REQUIREMENTS, scales_out_of_order
from blip3.serving.endpoint import EndpointHandler
from blip3.serving.memory import needs_of
from blip3.world.settings import load_settings
from blip3.world.tasks import rendered_records
from support import IS_TRANSFORMERS_5, ROOT, convert
from support.conversion import refused
from support.serving import SMALL_MODEL, complete_folder

torchao = pytest.importorskip("torchao.quantization", reason="pip install -e .[quantize]")
pytest.importorskip("bitsandbytes", reason="pip install -e .[quantize]")
pytest.importorskip("accelerate", reason="pip install -e .[quantize]")

KEEP = ["model.vision_tower", "model.resampler", "lm_head"]
KINDS = {
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=KEEP),
    "bitsandbytes int8": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEEP),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=KEEP
    ),
}
STORED_AS = {"torchao int8": "int8", "bitsandbytes int8": "int8", "bitsandbytes nf4": "nf4"}
# Least share of equal next tokens, and largest error of the logits as a share of their spread. Seen: all of 89 tokens
# equal, and 0.011, 0.020, 0.160.
LIMITS = {
    "torchao int8": (0.95, 0.05),
    "bitsandbytes int8": (0.95, 0.08),
    "bitsandbytes nf4": (0.9, 0.35),
}
TASKS, NUM_RECORDS, NUM_TOKENS = ("read", "name", "count", "relation", "compare"), 4, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return complete_folder(SMALL_MODEL, tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def load(folder, **options):
    options = {"dtype": torch.float32, "trust_remote_code": True} | options
    return AutoModelForImageTextToText.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def full(folder):
    return load(folder)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def quantized(folder, kind):
    return load(folder, quantization_config=KINDS[kind]())


@pytest.fixture(scope="module")
def prompts(processor):
    """Held-out rendered images with their questions, ready for the model."""
    settings = load_settings(ROOT / "recipes" / "small" / "world.yaml")
    found = []
    for task in TASKS:
        for record in rendered_records(task, "held_out", seed=11, count=NUM_RECORDS, settings=settings):
            content = record.turns[0].text
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            images = [image.open() for image in record.images]
            found.append(processor(text=text, images=images, return_tensors="pt"))
    return found


def answer(model, inputs):
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def answer_logits(model, inputs, ids):
    """Logits of each token of a given answer, (L, V)."""
    inputs = dict(inputs)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model(**inputs, logits_to_keep=ids.shape[1] + 1).logits[0, :-1].float()


@pytest.fixture(scope="module")
def references(full, prompts):
    """The full model's answers with their logits."""
    found = []
    for inputs in prompts:
        ids = answer(full, inputs)
        found.append((inputs, ids, answer_logits(full, inputs, ids)))
    return found


def test_a_quantized_model_answers_held_out_images_like_the_full_one(kind, quantized, references):
    same, error, spread, num_tokens, same_answers = 0, 0.0, 0.0, 0, 0
    for inputs, ids, expected in references:
        logits = answer_logits(quantized, inputs, ids)
        same += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        num_tokens += len(logits)
        error += float((logits - expected).square().sum())
        spread += float((expected - expected.mean(-1, keepdim=True)).square().sum())
        same_answers += torch.equal(answer(quantized, inputs), ids)
    share, noise = same / num_tokens, (error / spread) ** 0.5
    print(
        f"{kind} on the small model: {100 * share:.1f} % of {num_tokens} next tokens equal, "
        f"error of the logits {100 * noise:.1f} % of their spread, "
        f"{same_answers} of {len(references)} greedy answers of up to {NUM_TOKENS} tokens equal"
    )
    least, most = LIMITS[kind]
    assert share >= least
    assert noise <= most
    assert noise > 0, "nothing was quantized"


# -- What is quantized ------------------------------------------------------------------------------------------------


def stored_bytes(tensor):
    """Bytes of a tensor as it is stored, with the scales of its quantization."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size = tensor.numel() * tensor.element_size()
    state = getattr(tensor, "quant_state", None)  # nf4
    scales = state.absmax if state is not None else getattr(tensor, "SCB", None)  # or int8
    return size + (0 if scales is None else stored_bytes(scales))


def smaller_parts(model, full):
    """Names of the weights stored in fewer bytes than in the full model."""
    sizes = {name: stored_bytes(parameter) for name, parameter in full.named_parameters()}
    return {name for name, parameter in model.named_parameters() if stored_bytes(parameter) < sizes[name]}


def test_the_vision_tower_the_resampler_and_the_output_layer_stay_whole(quantized, full):
    changed = smaller_parts(quantized, full)
    linear = {f"{name}.weight" for name, module in full.named_modules() if isinstance(module, torch.nn.Linear)}
    assert changed == {name for name in linear if ".language_model." in name}
    assert changed


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="names of 4.57 may begin anywhere")
def test_names_must_be_complete_on_transformers_5(folder, full):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["vision_tower", "resampler", "lm_head"])
    changed = smaller_parts(load(folder, quantization_config=config), full)
    assert any("vision_tower" in name for name in changed)


def test_the_computed_size_is_that_of_the_tensors(folder, kind):
    model = load(folder, dtype=torch.bfloat16, quantization_config=KINDS[kind]())
    measured = sum(map(stored_bytes, model.parameters()))
    computed = needs_of(model.config).weight_bytes(STORED_AS[kind])
    assert measured == pytest.approx(computed, rel=0.02)


# -- Kept in files, and served ----------------------------------------------------------------------------------------


def save(quantized, folder, output):
    quantized.save_pretrained(output)
    for file in folder.iterdir():
        target = output / file.name
        if file.is_dir() and file.name == "blip3":
            shutil.copytree(file, target)
        elif file.is_file() and file.suffix != ".safetensors" and not target.exists():
            shutil.copy(file, target)
    return output


def test_a_quantized_model_is_saved_read_back_and_served(kind, quantized, folder, prompts, tmp_path):
    if kind.startswith("torchao") and not IS_TRANSFORMERS_5:
        with pytest.raises(ValueError, match="not serializable"):
            quantized.save_pretrained(tmp_path / "saved")
        return
    fresh = load(folder, quantization_config=KINDS[kind]())  # not the one that answered: see the tests of nf4 below
    saved = save(fresh, folder, tmp_path / "saved")
    again = load(saved)
    for inputs in prompts[:3]:
        assert torch.equal(answer_logits(again, inputs, inputs["input_ids"][:, -4:]), answer_logits(
            quantized, inputs, inputs["input_ids"][:, -4:]
        ))  # fmt: skip
    handler = EndpointHandler(str(saved))
    (reply,) = handler({"inputs": "How many dogs are there?", "parameters": {"max_new_tokens": 8, "do_sample": False}})
    assert reply["generated_tokens"] > 0


def column_order(tensors, rows):
    """Store the scales as bitsandbytes 0.50.2 leaves them after a forward on a CPU with AVX512-BF16."""
    names = [name for name in tensors if name.endswith(".absmax")]
    return tensors | {
        name: tensors[name].reshape(rows[name.removesuffix(".absmax")], -1).T.to(torch.bfloat16).contiguous()
        for name in names
    }


@pytest.fixture(scope="module")
def nf4(folder):
    return load(folder, quantization_config=KINDS["bitsandbytes nf4"]())


@pytest.fixture(scope="module")
def base(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("base") / "blip3-mini"
    convert(folder, output, "--license", "apache-2.0")
    return output


@pytest.mark.parametrize("has_run", [False, True])
def test_an_nf4_model_saved_after_it_answered_is_completed_rightly(folder, nf4, base, full, tmp_path, has_run, capsys):
    """As on a CPU with AVX512-BF16, where a forward changes the scales and saving does not change them back."""
    model = load(folder, quantization_config=KINDS["bitsandbytes nf4"]())
    ids = torch.arange(20, 60)[None]
    if has_run:
        model.generate(ids, max_new_tokens=2)
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    if has_run and not scales_out_of_order(path):
        rows = {name: len(parameter) for name, parameter in full.named_parameters()}
        save_file(column_order(tensors, rows), path, metadata={"format": "pt"})
    assert bool(scales_out_of_order(path)) == has_run
    convert(tmp_path / "saved", tmp_path / "out", "--base", base, "--verify")
    assert ("put 16 scales back in order" in capsys.readouterr().out) == has_run
    assert not scales_out_of_order(tmp_path / "out" / "model.safetensors")
    again = load(tmp_path / "out")
    with torch.no_grad():
        expected, found = nf4(input_ids=ids).logits, again(input_ids=ids).logits
        broken = load(tmp_path / "saved")(input_ids=ids).logits if has_run else expected
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    assert (found - expected).norm() / spread < 0.05  # scales rounded to bfloat16
    assert not has_run or (broken - expected).norm() / spread > 0.3, (
        "bitsandbytes reads such scales now: drop the mending"
    )


def test_a_quantized_folder_becomes_complete_with_one_command(kind, folder, base, tmp_path):
    if kind.startswith("torchao") and not IS_TRANSFORMERS_5:
        pytest.skip("transformers 4.57 cannot save torchao's weights")
    load(folder, quantization_config=KINDS[kind]()).save_pretrained(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "out", "--base", base, "--verify")
    requirements = (tmp_path / "out" / "requirements.txt").read_text()
    assert re.search(r"^accelerate>=", requirements, flags=re.MULTILINE)
    assert re.search(rf"^{kind.split()[0]}>=", requirements, flags=re.MULTILINE)
    assert f"quantized by {kind.split()[0]}" in (tmp_path / "out" / "README.md").read_text()
    handler = EndpointHandler(str(tmp_path / "out"))
    (reply,) = handler({"inputs": "How many dogs are there?", "parameters": {"max_new_tokens": 4, "do_sample": False}})
    assert reply["generated_tokens"] > 0


def test_a_quantized_folder_has_no_other_dtype(folder, nf4, tmp_path, capsys):
    load(folder, quantization_config=KINDS["bitsandbytes nf4"]()).save_pretrained(tmp_path / "saved")
    assert "quantize that" in refused(capsys, tmp_path / "saved", tmp_path / "out", "--dtype", "bfloat16")


def test_the_requirements_are_those_of_the_extra():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^quantize = \[(.*)\]$", text, flags=re.MULTILINE)
    assert {name for names in REQUIREMENTS.values() for name in names} == set(re.findall(r'"(.+?)"', extra))


# -- The documentation ------------------------------------------------------------------------------------------------

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split("## Quantize")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_python_block_of_the_documentation_runs(folder, tmp_path, monkeypatch):
    (tmp_path / "blip3-4b").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in BLOCKS:
        first_line = block.splitlines()[0]
        assert re.match(r"# transformers (4\.57 and 5\.x|5\.x only): ", first_line), f"say which lines: {first_line}"
        if "only" in first_line and not IS_TRANSFORMERS_5:
            continue
        exec(compile(block, "docs/serving.md", "exec"), namespace)
        assert isinstance(namespace["model"], torch.nn.Module)
    assert len(BLOCKS) >= 3


@torch.no_grad()
def test_an_nf4_model_that_has_answered_is_saved_as_it_was(folder, tmp_path):
    """Saving restores what a forward on a CPU changed in place, in the file and in the model that goes on."""
    model = load(folder, quantization_config=KINDS["bitsandbytes nf4"]())
    ids = torch.arange(20, 60)[None]
    expected = model(input_ids=ids).logits
    model.generate(ids, max_new_tokens=2)
    model.save_pretrained(tmp_path)
    assert not scales_out_of_order(tmp_path / "model.safetensors")
    for again in (load(tmp_path), model):
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-2, atol=1e-2 * expected.abs().max())
