# SPDX-License-Identifier: Apache-2.0
"""The model's own contract: what is computed, how often, and which parameters it reaches."""

import inspect
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from blip3.hub import model_code
from support import ROOT, load_model, render_image

RELEASED_TILE_GRIDS = model_code("configuration_blip3.RELEASED_TILE_GRIDS")
TWELVE_TILE_GRIDS = model_code("configuration_blip3.TWELVE_TILE_GRIDS")
Blip3Config = model_code("configuration_blip3.Blip3Config")
Blip3ForConditionalGeneration = model_code("modeling_blip3.Blip3ForConditionalGeneration")
Blip3Model = model_code("modeling_blip3.Blip3Model")
count_views = model_code("tiling_blip3.count_views")
grid_of = model_code("tiling_blip3.grid_of")

TEXT = "<|user|>\n{}<|end|>\n<|assistant|>\nA red square.<|end|>\n"
SIZES = [(1, 1), (7, 10), (384, 384), (480, 640), (640, 480), (100, 900), (900, 100), (50, 600), (2000, 3), (11, 616)]
SIDE = 27


def batch(processor, images_per_row, **kwargs):
    images = [[render_image(*size, seed=i) for i, size in enumerate(sizes)] for sizes in images_per_row]
    texts = [TEXT.format("<image> " * len(sizes) + "What is in the image?") for sizes in images_per_row]
    return processor(text=texts, images=images, padding=True, return_tensors="pt", return_labels=True, **kwargs)


@contextmanager
def counting_calls(module: nn.Module):
    """Record the shape of the first argument of each call of a module."""
    shapes = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((args or tuple(kwargs.values()))[0].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


# -- the resampler ----------------------------------------------------------------------------------------------------


def test_dropping_hidden_patches_equals_masking_them(tiny_model):
    """The resampler without masks against Flamingo's equations with them."""
    resampler = tiny_model.model.resampler
    patches, mask = torch.randn(3, 20, resampler.config.hidden_size), torch.rand(3, 20) > 0.5
    mask[1] = False  # a group with nothing to see
    mask[2] = True
    latents = resampler.latents.expand(3, -1, -1)
    for layer in resampler.layers:
        x, z = layer.patch_norm(patches), layer.latent_norm(latents)
        q = layer.q_proj(z).unflatten(-1, (-1, 96)) * 96**-0.5
        k, v = (t.unflatten(-1, (-1, 96)) for t in layer.kv_proj(torch.cat([x, z], 1)).chunk(2, -1))
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k)
        visible = torch.cat([mask, torch.ones(3, z.shape[1], dtype=torch.bool)], 1)
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
        latents = latents + layer.o_proj(torch.einsum("nhqk,nkhd->nqhd", scores, v).flatten(2))
        latents = latents + layer.fc2(nn.functional.gelu(layer.fc1(layer.mlp_norm(latents))))
    expected = resampler.projection(resampler.norm(latents))
    for n in range(3):
        alone = resampler(patches[n][mask[n]], [(1, int(mask[n].sum()))])
        assert torch.allclose(alone[0], expected[n], atol=1e-5)


# -- nothing is computed that is thrown away --------------------------------------------------------------------------


def test_padded_tiles_never_reach_the_tower_and_each_layer_runs_once(tiny_model, processor):
    inputs = batch(processor, [[(150, 150), (20, 10)], [], [(60, 300)]])
    num_tiles = sum(count_views(grid_of(tuple(s), RELEASED_TILE_GRIDS, 76)) for s in inputs["image_sizes"].tolist())
    assert num_tiles < inputs["pixel_values"].shape[0] * inputs["pixel_values"].shape[1]
    layer = tiny_model.model.resampler.layers[0]
    with counting_calls(tiny_model.vision_tower) as tower_calls, counting_calls(layer) as layer_calls:
        tiny_model(**inputs)
    assert tower_calls == [(num_tiles, 3, 76, 76)]
    assert layer_calls == [(num_tiles * 8, 32)]


def test_logits_are_computed_only_where_asked(tiny_model, processor):
    inputs = {name: value for name, value in batch(processor, [[(150, 150)], []]).items() if name != "labels"}
    full = tiny_model(**inputs).logits
    with counting_calls(tiny_model.lm_head) as calls:
        last = tiny_model(**inputs, logits_to_keep=1).logits
        some = tiny_model(**inputs, logits_to_keep=torch.tensor([3, 5])).logits
        tiny_model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [shape[1] for shape in calls] == [1, 2, 1, 1]
    assert torch.allclose(last, full[:, -1:], atol=1e-5)
    assert torch.allclose(some, full[:, [3, 5]], atol=1e-5)


def test_generation_encodes_images_once_and_a_second_question_not_at_all(tiny_model, processor):
    image = render_image(150, 150)
    first, second = (
        processor(text=f"<|user|>\n<image>\n{question}<|end|>\n<|assistant|>\n", images=[image], return_tensors="pt")
        for question in ("What is in the image?", "How many dogs?")
    )
    with counting_calls(tiny_model.vision_tower) as calls:
        expected = tiny_model.generate(**second, max_new_tokens=4, do_sample=False)
        assert len(calls) == 1
        features = tiny_model.get_image_features(first["pixel_values"], first["image_sizes"])
        assert len(calls) == 2
        for inputs in (first, second):
            text_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            answer = tiny_model.generate(
                **text_inputs, mm_encoder_outputs={"image": features}, max_new_tokens=4, do_sample=False
            )
        assert len(calls) == 2
    assert torch.equal(answer, expected)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tower_frozen", [True, False])
@pytest.mark.parametrize("images_per_row", [[[], []], [[(150, 150)], []]], ids=["text only", "mixed"])
def test_training_leaves_no_trainable_parameter_without_gradient(
    tiny_repo, processor, is_tower_frozen, images_per_row
):
    model = load_model(tiny_repo).train()
    model.vision_tower.requires_grad_(not is_tower_frozen)
    inputs = batch(processor, images_per_row)
    with counting_calls(model.vision_tower) as calls:
        loss = model(**inputs).loss
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    has_images = any(images_per_row)
    assert len(calls) == (has_images or not is_tower_frozen)
    assert torch.allclose(loss, model.eval()(**inputs).loss), "the idle vision pass must not change the loss"


def test_gradient_checkpointing_gives_the_same_gradients(tiny_repo, processor):
    inputs = batch(processor, [[(150, 150), (20, 10)], []])
    gradients = []
    for uses_checkpointing in (False, True):
        model = load_model(tiny_repo).train()
        if uses_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in model.model.resampler.layers)
        model(**inputs).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


# -- variants ---------------------------------------------------------------------------------------------------------


def test_flex_attention_agrees_in_the_resampler(tiny_repo, tiny_model, processor):
    model = load_model(tiny_repo, attn_implementation={"resampler_config": "flex_attention"}).eval()
    assert model.model.resampler.config._attn_implementation == "flex_attention"
    inputs = batch(processor, [[(150, 150), (20, 10)]])
    # Uncompiled: half a minute of compiling would test torch.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.allclose(model(**inputs).logits, tiny_model(**inputs).logits, atol=2e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(tiny_repo, tiny_model, processor, implementation):
    model = load_model(tiny_repo, attn_implementation=implementation).eval()
    assert model.model.resampler.config._attn_implementation == implementation
    inputs = batch(processor, [[(150, 150), (20, 10)]])
    assert torch.allclose(model(**inputs).logits, tiny_model(**inputs).logits, atol=2e-4)


def test_the_resampler_goes_through_the_attention_interface(tiny_repo, processor):
    from transformers import AttentionInterface

    calls = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        calls.append((tuple(query.shape), tuple(key.shape), attention_mask))
        output = nn.functional.scaled_dot_product_attention(query, key, value, scale=kwargs["scaling"])
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("recording", recording)
    model = load_model(tiny_repo).eval()
    inputs = batch(processor, [[(60, 300)]])
    expected = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    model.model.resampler.config._attn_implementation = "recording"
    answer = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    assert torch.allclose(answer, expected, atol=1e-5)
    assert all(mask is None for _, _, mask in calls)
    assert len(calls) >= 2


def test_a_cpu_infers_few_views_at_a_time(tiny_model, processor, monkeypatch):
    images = dict(processor.image_processor([render_image(150, 150), render_image(60, 300)], return_tensors="pt"))
    num_views: list[int] = []
    hook = tiny_model.model.vision_tower.register_forward_pre_hook(lambda _, given: num_views.append(len(given[0])))
    try:
        with torch.inference_mode():
            at_once = tiny_model.get_image_features(**images)
            monkeypatch.setattr(type(tiny_model.model), "values_at_once", 1)
            apart = tiny_model.get_image_features(**images)
            asked_for_more = tiny_model.get_image_features(**images, output_hidden_states=True)
            monkeypatch.setattr(tiny_model.config.vision_config, "output_hidden_states", True)
            told_to_give_more = tiny_model.get_image_features(**images)
            monkeypatch.undo()
        tiny_model.get_image_features(**images)  # with gradients
    finally:
        hook.remove()
    total = num_views[0]
    assert total > 5
    assert num_views == [total] + [1] * total + [total, total, total]
    assert torch.allclose(apart.last_hidden_state, at_once.last_hidden_state, atol=1e-5)
    assert len(asked_for_more.hidden_states[-1]) == len(told_to_give_more.hidden_states[-1]) == total
    for one, other in zip(apart.pooler_output, at_once.pooler_output, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("changes", [{"token_sampling": "fixed"}, {"tile_grouping": "tiles"}])
def test_other_samplings_run_and_count_their_tokens(tiny_repo, processor, changes):
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    for name, value in changes.items():
        setattr(config.resampler_config, name, value)
    model = load_model(tiny_repo, config=config).eval()
    sizes, shown = [(150, 150), (60, 300)], [render_image(150, 150), render_image(60, 300)]
    images = dict(processor.image_processor(shown, return_tensors="pt"))
    lengths = [len(tokens) for tokens in model.get_image_features(**images).pooler_output]
    assert lengths == [model.model.count_image_tokens(size) for size in sizes]
    if "token_sampling" in changes:
        assert lengths == [8, 8]
    run = [model.config.image_token_id] * lengths[0] + [300, 301] + [model.config.image_token_id] * lengths[1]
    ids = torch.tensor([[310, *run, 320]])
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **images, max_new_tokens=3)
    assert generated.shape[1] > ids.shape[1]


def test_a_model_without_grids_has_one_tile_slot(tiny_repo, tiny_model, processor):
    """A base checkpoint's layout gives what the any-resolution layout gives for a global view alone."""
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    config.tile_grids = []
    model = load_model(tiny_repo, config=config).eval()
    base_processor = type(processor.image_processor)(size=processor.image_processor.size, tile_grids=[])
    images = [render_image(150, 150), render_image(30, 400)]
    ours = base_processor(images, return_tensors="pt")
    assert ours["pixel_values"].shape == (2, 1, 3, 76, 76)
    assert ours["image_sizes"].tolist() == [[150, 150], [30, 400]]
    expected = processor.image_processor(images, return_tensors="pt", do_image_splitting=False)
    for mine, theirs in zip(
        model.get_image_features(**ours).pooler_output,
        tiny_model.get_image_features(**expected).pooler_output,
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_flat_tiles_are_accepted_too(tiny_model, processor):
    images = processor.image_processor([render_image(150, 150), render_image(20, 10)], return_tensors="pt")
    counts = [count_views(grid_of(tuple(size), RELEASED_TILE_GRIDS, 76)) for size in images["image_sizes"].tolist()]
    flat = torch.cat([slots[:n] for slots, n in zip(images["pixel_values"], counts, strict=True)])
    padded = tiny_model.get_image_features(**images).pooler_output
    for one, other in zip(
        tiny_model.get_image_features(flat, images["image_sizes"]).pooler_output, padded, strict=True
    ):
        assert torch.equal(one, other)


# -- building and loading ---------------------------------------------------------------------------------------------


def test_the_released_size_builds_on_the_meta_device_without_a_hub():
    with torch.device("meta"):
        model = Blip3ForConditionalGeneration(Blip3Config())
    dead_rows = 2 * 52 * 3072 + 52  # of the embedding and of the output layer, and 52 output biases
    pooling_head = 15_238_352
    assert sum(p.numel() for p in model.parameters()) == 4_359_257_219 - pooling_head - dead_rows
    assert not any("head." in name and "lm_head" not in name for name, _ in model.named_parameters())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_released_configuration_is_the_default_configuration():
    root = AutoConfig.from_pretrained(ROOT, subfolder="configs/4b", trust_remote_code=True).to_dict()
    default = Blip3Config().to_dict()
    for key in ("image_token_id", "tile_grids", "lm_head_bias", "vision_config", "resampler_config", "text_config"):
        ours, theirs = root[key], default[key]
        if isinstance(ours, dict):
            ours, theirs = (
                {k: v for k, v in values.items() if k not in ("dtype", "torch_dtype", "_name_or_path")}
                for values in (ours, theirs)
            )
        assert ours == theirs, key


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_are_tied_where_the_configuration_says_so_alone(tiny_repo, tmp_path, is_tied, inner):
    values = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True).to_dict()
    values["text_config"]["tie_word_embeddings"] = inner
    model = Blip3ForConditionalGeneration(
        Blip3Config(**{k: v for k, v in values.items() if k != "auto_map"} | {"tie_word_embeddings": is_tied})
    )
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_newly_initialised_model_saves_its_tower_under_the_names_of_both_lines(tiny_repo, tmp_path):
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    model = Blip3ForConditionalGeneration(config)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            tower = [name for name in file.keys() if "vision_tower" in name]  # noqa: SIM118
        assert tower
        assert all(name.startswith("model.vision_tower.vision_model.") for name in tower)
        again = type(model).from_pretrained(folder)
        assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
        model = again


def test_a_decoder_may_name_its_initial_spread_otherwise(tiny_repo):
    values = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True).to_dict()
    width = values["text_config"]["hidden_size"]
    values["text_config"] = {
        "model_type": "opt", "vocab_size": values["text_config"]["vocab_size"], "hidden_size": width, "ffn_dim": 64,
        "word_embed_proj_dim": width, "num_hidden_layers": 1, "num_attention_heads": 2, "init_std": 0.5,
    }  # fmt: skip
    model = Blip3ForConditionalGeneration(Blip3Config(**{k: v for k, v in values.items() if k != "auto_map"}))
    assert 0.4 < model.lm_head.weight.std() < 0.6


def test_misspelt_arguments_of_the_configuration_are_refused(tiny_repo):
    for name in inspect.signature(Blip3Config).parameters:
        if name != "kwargs":
            with pytest.raises(ValueError, match=rf"Did you mean '{name}'"):
                Blip3Config(**{name[:-1]: None})


def test_fresh_weights_are_initialised(tiny_repo):
    config = AutoConfig.from_pretrained(tiny_repo, trust_remote_code=True)
    model = Blip3Model(Blip3Config(**{k: v for k, v in config.to_dict().items() if k != "auto_map"}))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
    assert 0.01 < model.resampler.latents.std() < 0.03
    assert model.resampler.layers[0].patch_norm.weight.eq(1).all()


def test_no_split_modules_names_only_classes_that_exist(tiny_model):
    present = {type(module).__name__ for module in tiny_model.modules()}
    assert (
        {"Blip3ResamplerLayer", "Phi3DecoderLayer", "SiglipEncoderLayer"}
        <= set(tiny_model._no_split_modules)
        <= present
    )


def test_model_files_import_nothing_heavy():
    """Loading the configuration must not import torchvision or other extras."""
    code = (
        "import sys; from blip3.hub import model_code; model_code('modeling_blip3'); model_code('processing_blip3'); "
        "print(sorted({'torchvision', 'einops', 'timm', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert result.stdout.strip().splitlines()[-1] == "[]"
