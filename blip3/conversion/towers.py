# SPDX-License-Identifier: Apache-2.0
"""Vision towers under the names of those who published them, in transformers' names; CLIP's back to open_clip's.

In: `View`s of a file. Out: `View`s under `vision_encoder.`, followed by transformers' names of `SiglipVisionModel` or
`CLIPVisionModel`, or by `timm_model.` and timm's own names where transformers has no class for the tower.

    transformers  SigLIP, CLIP                                              embeddings.patch_embedding
    timm          SigLIP and CLIP renamed, q, k and v split; others kept    patch_embed.proj
    open_clip     CLIP renamed, q, k and v split (the first family's)       conv1
"""

import re
from dataclasses import replace
from typing import Any

from ..refusals import list_names
from .names import INNER, PROJECTION, TIMM, TIMM_PART, TOWER, Pairs, swap_prefix
from .tensors import Views, concat

PREFIX = "vision_encoder."
KEPT = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
TIMM_NAMES: Pairs = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.proj.", "self_attn.out_proj."),
    ("norm_pre.", "pre_layrnorm."),
    ("norm.", "post_layernorm."),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding.weight"),
)
OPEN_CLIP_NAMES: Pairs = (
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1.", "embeddings.patch_embedding."),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
)
OPEN_CLIP_PARTS: Pairs = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
HEADS_OF_WIDTH = {768: 12, 1024: 16, 1280: 16}  # of the CLIP towers that OpenAI and DFN5B published


def find_tower(views: Views, description: str, given: dict | None = None) -> Views:
    """Find a tower under any of the namings; text tower and timm's pooling head are left out.

    Args:
        views: as the file names them.
        description: where they are from.
        given: the tower's config.json, whichever library wrote it.

    Raises:
        ValueError: if there is none.
    """
    for prefix in ("vlm.vision_encoder.", PREFIX, TOWER + INNER, TOWER, INNER, ""):
        if prefix + "embeddings.patch_embedding.weight" in views:
            tower = _below(prefix, views)
            names = [name for name in tower if name.startswith(KEPT) and "position_ids" not in name]
            return {PREFIX + name: tower[name] for name in names}
    for prefix in ("visual.trunk.", "trunk.", PREFIX + TIMM, TOWER + TIMM, TIMM, ""):
        if prefix + "patch_embed.proj.weight" in views:
            settings = (given or {}).get("vision_config", given or {})
            return _from_timm(_below(prefix, views), str(settings.get("architecture", "siglip")))
    for prefix in ("vlm.vision_encoder.", PREFIX, "visual.", ""):
        if prefix + "conv1.weight" in views:
            tower = from_open_clip({PREFIX + name: view for name, view in _below(prefix, views).items()})
            kept = tuple(PREFIX + name for name in KEPT)
            return {name: view for name, view in tower.items() if name.startswith(kept) or name == PROJECTION}
    raise ValueError(
        f"{description} has {len(views)} tensors ({list_names(views)}) and none is a patch embedding, in the naming "
        "of transformers (embeddings.patch_embedding), timm (patch_embed.proj) or open_clip (conv1). It is probably "
        "another model: pass SigLIP, CLIP or a ViT of timm."
    )


def _below(prefix: str, views: Views) -> Views:
    return {name.removeprefix(prefix): view for name, view in views.items() if name.startswith(prefix)}


def _from_timm(views: Views, architecture: str) -> Views:
    """Rename SigLIP and CLIP; a ViT that transformers has no class for keeps timm's names."""
    views = {name: view for name, view in views.items() if TIMM_PART.match(name) and not name.startswith("fc_norm.")}
    if not re.search("siglip|clip", architecture):
        return {PREFIX + TIMM + name: view for name, view in views.items()}
    result: Views = {}
    for name, view in views.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        prefix, rest = (f"encoder.layers.{block[1]}.", block[2]) if block else ("", name)
        if rest.startswith("attn.qkv."):
            result |= _split(view, PREFIX + prefix, rest.removeprefix("attn.qkv."))
            continue
        if rest == "pos_embed":  # (1, positions, width) in timm
            view = replace(view, shape=view.shape[-2:])
        if rest == "cls_token":
            view = replace(view, shape=view.shape[-1:])
        result[PREFIX + prefix + swap_prefix(rest, TIMM_NAMES)] = view
    return result


def from_open_clip(views: Views) -> Views:
    """Rename a CLIP tower of open_clip among released views; others stay as they are.

    Its projection behind the class token, which no model here uses, keeps its name.
    """
    if PREFIX + "conv1.weight" not in views:
        return views
    result: Views = {}
    for name, view in views.items():
        layer = re.fullmatch(r"vision_encoder\.transformer\.resblocks\.(\d+)\.(.+)", name)
        if not layer:
            result[PREFIX + swap_prefix(name.removeprefix(PREFIX), OPEN_CLIP_NAMES) if _is_tower(name) else name] = (
                view
            )
            continue
        prefix = f"{PREFIX}encoder.layers.{layer[1]}."
        if layer[2].startswith("attn.in_proj_"):
            result |= _split(view, prefix, layer[2].removeprefix("attn.in_proj_"))
        else:
            result[prefix + swap_prefix(layer[2], OPEN_CLIP_PARTS)] = view
    return result


def to_open_clip(views: Views) -> Views:
    """Undo `from_open_clip`."""
    result: Views = {}
    for name, view in views.items():
        layer = re.fullmatch(r"vision_encoder\.encoder\.layers\.(\d+)\.(.+)", name)
        if not layer:
            rest = swap_prefix(name.removeprefix(PREFIX), tuple((new, old) for old, new in OPEN_CLIP_NAMES))
            result[PREFIX + rest if _is_tower(name) else name] = view
            continue
        prefix = f"{PREFIX}transformer.resblocks.{layer[1]}."
        projection = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", layer[2])
        if projection is None:
            result[prefix + swap_prefix(layer[2], tuple((new, old) for old, new in OPEN_CLIP_PARTS))] = view
        elif projection[1] == "q":
            parts = [views[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[f"{prefix}attn.in_proj_{projection[2]}"] = concat(*parts)
    return result


def _is_tower(name: str) -> bool:
    return name.startswith(PREFIX) and name != PROJECTION


def _split(view: Any, prefix: str, kind: str) -> Views:
    """Split the rows of q, k and v that stand below each other; `kind` is weight or bias."""
    width = view.shape[0] // 3
    return {
        f"{prefix}self_attn.{letter}_proj.{kind}": view.rows(index * width, (index + 1) * width)
        for index, letter in enumerate("qkv")
    }


def is_clip(views: Views) -> bool:
    """Whether a tower is CLIP's, with a class token."""
    return PREFIX + "embeddings.class_embedding" in views


def given_sizes(given: dict | None) -> dict:
    """Read what tensors do not tell off a tower's configuration, in transformers' words.

    Args:
        given: a config.json of transformers (whole or its vision_config) or of timm, or an open_clip_config.json.
    """
    given = given or {}
    given = given.get("vision_config", given.get("model_cfg", given))
    if "vision_cfg" in given:
        tower = given["vision_cfg"]
        sizes = {"image_size": tower.get("image_size"), "hidden_act": _activation(given.get("quick_gelu"))}
        if "width" in tower:
            sizes["num_attention_heads"] = tower["width"] // tower.get("head_width", 64)
        return sizes
    if "architecture" in given:
        size = (given.get("pretrained_cfg") or {}).get("input_size") or [None]
        sizes = {"image_size": (given.get("model_args") or {}).get("img_size") or size[-1]}
        if "siglip" not in given["architecture"]:
            sizes["hidden_act"] = _activation("quickgelu" in given["architecture"])
            sizes["num_attention_heads"] = HEADS_OF_WIDTH.get(given.get("num_features", 0))
        return {name: value for name, value in sizes.items() if value is not None}
    if given.get("model_type") == "clip_vision_model" or "projection_dim" in given:
        return {"hidden_act": "quick_gelu", **given}  # which transformers leaves out as its default
    return given


def _activation(is_quick: Any) -> str:
    return "quick_gelu" if is_quick else "gelu"
