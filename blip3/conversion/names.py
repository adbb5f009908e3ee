# SPDX-License-Identifier: Apache-2.0
"""The tensors of BLIP-3 (xGen-MM, r-v1.5 and r-v1) by name: the only table from released names to ours, and shapes.

In: names, or a config. Out: names, or names with shapes. No file is read and no tensor is needed here.
Released names are written without their outermost `vlm.` everywhere.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from ..refusals import check_positive, list_names

Pairs = tuple[tuple[str, str], ...]
Shapes = dict[str, tuple[int, ...]]
Weight = TypeVar("Weight")

TOWER = "model.vision_tower."
INNER = "vision_model."  # before each name inside a tower: always in files, in memory on transformers 4.57 alone

TIMM = "timm_model."  # in its place, where the tower is timm's, on both lines

PREFIXES: Pairs = (
    ("vision_encoder." + TIMM, TOWER + TIMM),
    ("vision_encoder.", TOWER + INNER),
    ("vision_tokenizer.", "model.resampler."),
    ("lang_model.model.", "model.language_model."),
    ("lang_model.lm_head.", "lm_head."),
)
RESAMPLER_PARTS: Pairs = (
    ("0.norm_media.", "patch_norm."),
    ("0.norm_latents.", "latent_norm."),
    ("0.to_q.", "q_proj."),
    ("0.to_kv.", "kv_proj."),
    ("0.to_out.", "o_proj."),
    ("1.0.", "mlp_norm."),
    ("1.1.", "fc1."),
    ("1.3.", "fc2."),
)
RESAMPLER_LAYER = re.compile(r"(model\.resampler\.layers\.\d+\.)(.+)")
TIMM_PART = re.compile(r"(patch_embed|blocks|cls_token|pos_embed|reg_token|norm|norm_pre|fc_norm)\b")
EMBEDDING = "lang_model.model.embed_tokens.weight"
HEAD_WEIGHT, HEAD_BIAS = "lang_model.lm_head.weight", "lang_model.lm_head.bias"
FOLDED = {
    EMBEDDING: "lang_model.model.embed_tokens.additional_embedding.weight",
    HEAD_WEIGHT: "lang_model.lm_head.additional_fc.weight",
    HEAD_BIAS: "lang_model.lm_head.additional_fc.bias",
}
DEAD_ROWS = "dead_rows."  # prefix, in original/unused.safetensors, of rows no token id reaches
POOLING_HEAD = "vision_encoder.head."  # SigLIP's
PROJECTION = "vision_encoder.proj"  # open_clip's, of the class token
UNUSED = (POOLING_HEAD, PROJECTION)
IMAGE_TOKENS = ("<image>", "<image placeholder>", "<|endofchunk|>")

# sha256 and bytes of the shards, from the pointer files of the releases.
KNOWN_RELEASES = {
    "xgen-mm-phi3-mini-base-r-v1.5": {
        "model-00001-of-00004.safetensors": (
            "45173ee95995173da1d019e4a66c5506e55f218380e7b8e31c78d53dbe75ced6",
            4962660968,
        ),
        "model-00002-of-00004.safetensors": (
            "ea05c36d3ff8eb154a24673a2ad4a068b0f35ef53df674501a160e5aa680ea73",
            4983112136,
        ),
        "model-00003-of-00004.safetensors": (
            "36b1b5c0001ce8a8bc13930b4d613025ad92a708f126948bff2faecd3acae8da",
            4983112168,
        ),
        "model-00004-of-00004.safetensors": (
            "25c7d1851170158d175cfa105f704daf18dc3f1e2d997a5bc5e8af883b93d2a0",
            2508236156,
        ),
    },
}


def to_ours(name: str) -> str:
    """Return our name of a released tensor.

    >>> to_ours("vision_tokenizer.layers.2.1.3.weight")
    'model.resampler.layers.2.fc2.weight'
    """
    name = swap_prefix(name, PREFIXES)
    layer = RESAMPLER_LAYER.fullmatch(name)
    return layer[1] + swap_prefix(layer[2], RESAMPLER_PARTS) if layer else name


def to_released(name: str) -> str:
    """Return the released name of one of our tensors; the tower's names in transformers 5.x are accepted too.

    >>> to_released("model.resampler.layers.2.fc2.weight")
    'vision_tokenizer.layers.2.1.3.weight'
    """
    name = name_for_both_lines(name)
    layer = RESAMPLER_LAYER.fullmatch(name)
    if layer:
        name = layer[1] + swap_prefix(layer[2], _back(RESAMPLER_PARTS))
    return swap_prefix(name, _back(PREFIXES))


def name_for_both_lines(name: str) -> str:
    """Return the name under which both transformers lines read one of our tensors: 4.57's, for the tower.

    >>> name_for_both_lines("model.vision_tower.embeddings.patch_embedding.bias")
    'model.vision_tower.vision_model.embeddings.patch_embedding.bias'
    """
    return TOWER + with_inner(name.removeprefix(TOWER)) if name.startswith(TOWER) else name


def with_inner(name: str) -> str:
    """Return the name inside a tower that transformers 4.57 has, and files on both lines."""
    return name if name.startswith(TIMM) else INNER + without_inner(name)


def without_inner(name: str) -> str:
    """Return the name inside a tower that transformers 5.x has."""
    return name.removeprefix(INNER)


def tower_weights_for(own_names: Iterable[str], weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Give a tower's weights the names that another tower has, on either line, and drop a pooling head.

    Args:
        own_names: of the tower that shall take the weights.
        weights: by name, inside the tower they come from.
    """
    rename = with_inner if any(name.startswith(INNER) for name in own_names) else without_inner
    return {rename(name): weight for name, weight in weights.items() if not without_inner(name).startswith("head.")}


def swap_prefix(name: str, pairs: Pairs) -> str:
    """Replace the first old prefix that fits by its new one; a name that none fits stays."""
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _back(pairs: Pairs) -> Pairs:
    return tuple((new, old) for old, new in pairs)


def expected_shapes(config: dict) -> Shapes:
    """Return every tensor of a folded checkpoint by its released name.

    Args:
        config: our config.json, with a phi3 text_config.
    """
    vision, resampler, text = (config[f"{part}_config"] for part in ("vision", "resampler", "text"))
    return _vision_shapes(vision) | _resampler_shapes(resampler, text["hidden_size"]) | _text_shapes(text)


def _vision_shapes(vision: dict) -> Shapes:
    if vision["model_type"] == "timm_wrapper":
        return _timm_shapes(vision)
    width, mlp, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    is_clip = vision["model_type"] == "clip_vision_model"
    positions = (vision["image_size"] // patch) ** 2 + is_clip
    shapes = {
        "vision_encoder.embeddings.patch_embedding.weight": (width, vision["num_channels"], patch, patch),
        "vision_encoder.embeddings.position_embedding.weight": (positions, width),
    } | _norm("vision_encoder.post_layernorm", width)
    if is_clip:
        shapes |= {"vision_encoder.embeddings.class_embedding": (width,)} | _norm("vision_encoder.pre_layrnorm", width)
    else:
        shapes["vision_encoder.embeddings.patch_embedding.bias"] = (width,)
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"vision_encoder.encoder.layers.{layer}."
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= _norm(prefix + name, width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{prefix}self_attn.{name}.weight": (width, width), f"{prefix}self_attn.{name}.bias": (width,)}
        shapes |= {f"{prefix}mlp.fc1.weight": (mlp, width), f"{prefix}mlp.fc1.bias": (mlp,)}
        shapes |= {f"{prefix}mlp.fc2.weight": (width, mlp), f"{prefix}mlp.fc2.bias": (width,)}
    return shapes


def _timm_shapes(vision: dict) -> Shapes:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"The vision tower is timm's {vision['architecture']!r}, and timm, which builds it and tells its tensors, "
            "is not installed. It is probably missing from this environment alone: pip install timm"
        ) from error
    import torch

    with torch.device("meta"):
        tower = timm.create_model(vision["architecture"], pretrained=False, num_classes=0, **vision["model_args"])
    return {f"vision_encoder.{TIMM}{name}": tuple(each.shape) for name, each in tower.state_dict().items()}


def _resampler_shapes(resampler: dict, text_width: int) -> Shapes:
    width, mlp = resampler["hidden_size"], resampler["intermediate_size"]
    inner = resampler["num_attention_heads"] * resampler["head_dim"]
    shapes = {
        "vision_tokenizer.latents": (resampler["num_latents"], width),
        "vision_tokenizer.projection.weight": (text_width, width),
        "vision_tokenizer.projection.bias": (text_width,),
    } | _norm("vision_tokenizer.norm", width)
    if resampler.get("num_text_queries"):
        for name, columns in (("0", text_width), ("2", width)):
            shapes[f"vision_tokenizer.text_projection.{name}.weight"] = (width, columns)
            shapes[f"vision_tokenizer.text_projection.{name}.bias"] = (width,)
    for layer in range(resampler["num_hidden_layers"]):
        prefix = f"vision_tokenizer.layers.{layer}."
        for name in ("0.norm_media", "0.norm_latents", "1.0"):
            shapes |= _norm(prefix + name, width)
        shapes |= {
            prefix + "0.to_q.weight": (inner, width),
            prefix + "0.to_kv.weight": (2 * inner, width),
            prefix + "0.to_out.weight": (width, inner),
            prefix + "1.1.weight": (mlp, width),
            prefix + "1.3.weight": (width, mlp),
        }
    return shapes


def _text_shapes(text: dict) -> Shapes:
    width, mlp, vocab = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    shapes: Shapes = {EMBEDDING: (vocab, width), HEAD_WEIGHT: (vocab, width), HEAD_BIAS: (vocab,)}
    shapes["lang_model.model.norm.weight"] = (width,)
    query, key = projection_widths(text)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"lang_model.model.layers.{layer}."
        shapes |= {
            prefix + "self_attn.qkv_proj.weight": (query + 2 * key, width),
            prefix + "self_attn.o_proj.weight": (width, query),
            prefix + "mlp.gate_up_proj.weight": (2 * mlp, width),
            prefix + "mlp.down_proj.weight": (width, mlp),
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
        }
    return shapes


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def projection_widths(text: dict) -> tuple[int, int]:
    """Return the rows of the query projection and of the key (and value) projection of a text_config.

    Raises:
        ValueError: if a number of heads is not positive.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        check_positive(
            f"text_config has {name}", text[name], advice="config.json is probably damaged: download it again"
        )
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    return text["num_attention_heads"] * head_dim, text["num_key_value_heads"] * head_dim


def check_shapes(shapes: Shapes, config: dict, description: str) -> None:
    """Compare a folded checkpoint with its config.

    Args:
        shapes: released names and shapes.
        config: our config.json, with a phi3 text_config.
        description: where the tensors are from.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape.
    """
    expected = expected_shapes(config)
    missing, unexpected = set(expected) - set(shapes), set(shapes) - set(expected)
    if config.get("tie_word_embeddings") and HEAD_WEIGHT in missing:
        raise ValueError(
            f"{description} shares its input and output embeddings (tie_word_embeddings is true in its config), but a "
            "released checkpoint has an output layer of its own. It was probably trained around another language "
            "model: give it one (lm_head.weight = nn.Parameter(lm_head.weight.clone()), and tie_word_embeddings false "
            "in its configuration), save it, and convert that folder."
        )
    if missing or unexpected:
        lists = [f"{len(missing)} are missing: {list_names(missing)}"] if missing else []
        lists += [f"{len(unexpected)} are unexpected: {list_names(unexpected)}"] if unexpected else []
        raise ValueError(
            f"{description} should hold {len(expected)} tensors (after folding); {'; '.join(lists)}. The file is "
            "probably incomplete or its config belongs to another checkpoint: check both, or pass --source-config."
        )
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if wrong:
        raise ValueError(
            f"{description} has {len(wrong)} tensors of another shape than its config gives: {'; '.join(wrong[:4])}. "
            "The config probably belongs to another checkpoint: pass the right one with --source-config."
        )
