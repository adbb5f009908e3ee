# SPDX-License-Identifier: Apache-2.0
"""A tiny BLIP-3 with random weights in the release's own layout: what tests convert.

It has every part of a released checkpoint (vision pooling head, decoupled embeddings, output bias, byte-fallback
tokenizer with the same markers) at a few hundred thousand parameters, so that nothing needs the 17 GB of the release.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TILE_SIZE, PATCH_SIZE, VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_MLP = 76, 14, 32, 2, 2, 48
NUM_LATENTS, RESAMPLER_LAYERS, RESAMPLER_INNER = 8, 2, 192
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_KV_HEADS, TEXT_MLP, VOCAB_ROWS = 48, 2, 4, 2, 80, 640

MARKERS = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<pad>"]
_CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "What is in the picture? How many dogs are there? Read the number on the sign, please.",
    "A red square is to the left of a blue circle, above two green triangles.",
]


def build_tokenizer() -> Tokenizer:
    """Train a small byte-fallback BPE with the pipeline of Phi-3's tokenizer.json."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=480, special_tokens=specials, show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(state["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>")])
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    for token in MARKERS:
        is_turn_marker = token not in ("<|endoftext|>", "<pad>")
        tokenizer.add_special_tokens([AddedToken(token, rstrip=is_turn_marker, normalized=False)])
    return tokenizer


def write_release_layout(folder: str | Path, seed: int = 0) -> Path:
    """Write a complete source repository for `convert_weights.py`, instruct variant, random weights.

    Args:
        folder: created if missing.
        seed: of the weights.

    Returns:
        The folder. Its `siglip_vision_config.json` goes to `--vision-config`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    num_tokens = tokenizer.get_vocab_size()
    save_file(_random_tensors(num_tokens, seed), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in ("<s>", *MARKERS)}
    side = TILE_SIZE
    grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]
    files = {
        "config.json": {
            "architectures": ["XGenMMModelForConditionalGeneration"],
            "model_type": "xgenmm",
            "text_config": {
                "model_type": "phi3",
                "initial_tokenizer_len": num_tokens,
                "vocab_size": VOCAB_ROWS,
                "hidden_size": TEXT_WIDTH,
                "intermediate_size": TEXT_MLP,
                "num_hidden_layers": TEXT_LAYERS,
                "num_attention_heads": TEXT_HEADS,
                "num_key_value_heads": TEXT_KV_HEADS,
                "sliding_window": 2047,
                "bos_token_id": ids["<s>"],
                "eos_token_id": ids["<|endoftext|>"],
                "pad_token_id": ids["<|endoftext|>"],
                "torch_dtype": "float32",
            },
            "torch_dtype": "float32",
            "vision_encoder_config": {
                "anyres_grids": grids,
                "anyres_patch_sampling": True,
                "image_aspect_ratio": "anyres",
                "model_type": "xgenmm_vision_encoder",
            },
            "vision_tokenizer_config": {
                "model_type": "xgenmm_vision_tokenizer",
                "vis_feature_dim": VISION_WIDTH,
                "lang_embedding_dim": TEXT_WIDTH,
                "num_vis_tokens": NUM_LATENTS,
            },
        },
        "preprocessor_config.json": {
            "do_resize": True,
            "grids": grids,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Blip3ImageProcessor",
            "interpolation_mode": "bicubic",
            "resize_mode": "squash",
            "size": [side, side],
        },
        "siglip_vision_config.json": {
            "hidden_size": VISION_WIDTH,
            "intermediate_size": VISION_MLP,
            "num_hidden_layers": VISION_LAYERS,
            "num_attention_heads": VISION_HEADS,
            "image_size": side,
            "patch_size": PATCH_SIZE,
        },
        "generation_config.json": {"bos_token_id": ids["<s>"], "eos_token_id": ids["<|endoftext|>"]},
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "model_max_length": 4096,
            "padding_side": "left",
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def _random_tensors(num_tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors under the release's names, scaled so that answers depend on the image."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 1.6 / shape[-1] ** 0.5

    def bias(width: int) -> torch.Tensor:
        return torch.randn(width, generator=generator) * 0.1

    def norm(prefix: str, width: int) -> dict[str, torch.Tensor]:
        return {f"{prefix}.weight": 1 + bias(width), f"{prefix}.bias": bias(width)}

    def linear(prefix: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{prefix}.weight": weight(outputs, inputs), f"{prefix}.bias": bias(outputs)}

    tensors = _vision_tensors(weight, bias, norm, linear)
    prefix, width = "vlm.vision_tokenizer", VISION_WIDTH
    tensors[f"{prefix}.latents"] = torch.randn(NUM_LATENTS, width, generator=generator)
    tensors |= linear(f"{prefix}.projection", TEXT_WIDTH, width) | norm(f"{prefix}.norm", width)
    for layer in (f"{prefix}.layers.{index}" for index in range(RESAMPLER_LAYERS)):
        tensors |= norm(f"{layer}.0.norm_media", width) | norm(f"{layer}.0.norm_latents", width)
        tensors |= norm(f"{layer}.1.0", width)
        tensors[f"{layer}.0.to_q.weight"] = weight(RESAMPLER_INNER, width)
        tensors[f"{layer}.0.to_kv.weight"] = weight(2 * RESAMPLER_INNER, width)
        tensors[f"{layer}.0.to_out.weight"] = weight(width, RESAMPLER_INNER)
        tensors[f"{layer}.1.1.weight"] = weight(4 * width, width)
        tensors[f"{layer}.1.3.weight"] = weight(width, 4 * width)
    prefix, width = "vlm.lang_model", TEXT_WIDTH
    head_dim = width // TEXT_HEADS
    tensors[f"{prefix}.model.embed_tokens.weight"] = torch.randn(VOCAB_ROWS, width, generator=generator)
    tensors[f"{prefix}.model.embed_tokens.additional_embedding.weight"] = torch.randn(3, width, generator=generator)
    tensors[f"{prefix}.model.norm.weight"] = 1 + bias(width)
    tensors |= linear(f"{prefix}.lm_head", VOCAB_ROWS, width) | linear(f"{prefix}.lm_head.additional_fc", 3, width)
    for layer in (f"{prefix}.model.layers.{index}" for index in range(TEXT_LAYERS)):
        tensors[f"{layer}.self_attn.qkv_proj.weight"] = weight((TEXT_HEADS + 2 * TEXT_KV_HEADS) * head_dim, width)
        tensors[f"{layer}.self_attn.o_proj.weight"] = weight(width, width)
        tensors[f"{layer}.mlp.gate_up_proj.weight"] = weight(2 * TEXT_MLP, width)
        tensors[f"{layer}.mlp.down_proj.weight"] = weight(width, TEXT_MLP)
        tensors[f"{layer}.input_layernorm.weight"] = 1 + bias(width)
        tensors[f"{layer}.post_attention_layernorm.weight"] = 1 + bias(width)
    return tensors


def _vision_tensors(weight, bias, norm, linear) -> dict[str, torch.Tensor]:
    prefix, width = "vlm.vision_encoder", VISION_WIDTH
    tensors = {
        f"{prefix}.embeddings.patch_embedding.weight": weight(width, 3, PATCH_SIZE, PATCH_SIZE) / 6,
        f"{prefix}.embeddings.patch_embedding.bias": bias(width),
        f"{prefix}.embeddings.position_embedding.weight": weight((TILE_SIZE // PATCH_SIZE) ** 2, width),
        f"{prefix}.head.probe": weight(1, 1, width),
        f"{prefix}.head.attention.in_proj_weight": weight(3 * width, width),
        f"{prefix}.head.attention.in_proj_bias": bias(3 * width),
    }
    tensors |= norm(f"{prefix}.post_layernorm", width) | norm(f"{prefix}.head.layernorm", width)
    tensors |= linear(f"{prefix}.head.attention.out_proj", width, width)
    tensors |= linear(f"{prefix}.head.mlp.fc1", VISION_MLP, width) | linear(
        f"{prefix}.head.mlp.fc2", width, VISION_MLP
    )
    for layer in (f"{prefix}.encoder.layers.{index}" for index in range(VISION_LAYERS)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= linear(f"{layer}.self_attn.{name}", width, width)
        tensors |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        tensors |= linear(f"{layer}.mlp.fc1", VISION_MLP, width) | linear(f"{layer}.mlp.fc2", width, VISION_MLP)
    return tensors
