# SPDX-License-Identifier: Apache-2.0
"""Vision towers of every kind, read alike: which of a tower's tokens are patches, and what its weights are called.

    views (N, 3, S, S) --> SigLIP | CLIP | DINOv2 | a ViT of timm --> tokens (N, C + P, D)
                                                                          | patch_tokens
                                                                      patch tokens (N, P, D), after the last norm

N views of side S, P = p * p patches each (`Blip3Config.patches_per_side` is p), C class tokens and registers, D width.
"""

from typing import Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_blip3 import Blip3Config

try:  # transformers 5
    from transformers.conversion_mapping import get_model_conversion_mapping
except ImportError:
    get_model_conversion_mapping = None


def patch_tokens(
    vision_tower: nn.Module, outputs: BaseModelOutputWithPooling, config: Blip3Config
) -> BaseModelOutputWithPooling:
    """Keep of a tower's tokens those of its patches, after its last norm.

    Some towers put a class token (CLIP, DINOv2) and registers before them. CLIP itself norms its class token alone.

    Args:
        vision_tower: that gave them.
        outputs: with tokens (N, C + P, D) as `last_hidden_state`; changed in place.
        config: of the whole model.

    Raises:
        ValueError: if the number of tokens is not that of the patches, with or without these.
    """
    tokens, settings = outputs.last_hidden_state, config.vision_config
    timm_model: Any = getattr(vision_tower, "timm_model", None)
    if timm_model is None:
        known: tuple[int, ...] = (0, 1, 1 + getattr(settings, "num_register_tokens", 0))
    else:
        known = (getattr(timm_model, "num_prefix_tokens", 0),)
    num_prefix = tokens.shape[1] - config.patches_per_side**2
    if tokens.ndim != 3 or num_prefix not in known:
        raise ValueError(
            f"The vision tower ({settings.model_type}) gives {tokens.shape[1]} tokens a view but its image_size "
            f"and patch_size make {config.patches_per_side**2} patches: expected that many, behind "
            f"{' or '.join(map(str, dict.fromkeys(known)))} special tokens. It probably merges patches or has "
            "other special tokens: use a tower that keeps one token a patch, such as SigLIP, CLIP or DINOv2."
        )
    patches = tokens[:, num_prefix:]
    if settings.model_type == "clip_vision_model":
        clip: Any = getattr(vision_tower, "vision_model", vision_tower)  # 4.57 has one inside the other
        patches = clip.post_layernorm(patches)
    outputs.last_hidden_state = patches
    return outputs


def first_layer(vision_tower: Any) -> nn.Module:
    """The layer that makes patches of pixels."""
    timm_model: Any = getattr(vision_tower, "timm_model", None)
    return vision_tower.get_input_embeddings() if timm_model is None else timm_model.patch_embed


def _forget_unused_conversions(model: nn.Module) -> None:
    """Forget conversions of names that the model's checkpoint did not need.

    A model that transformers 5 loads under ZeRO-3 remembers all that it might have needed, and would save its weights
    under names that it reads nowhere else (seen with 5.24).
    """
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions and hasattr(conversions[0], "was_used"):
        used: Any = [each for each in conversions if each.was_used()]
        model._weight_conversions = used


def name_tower_for_both_lines(model: nn.Module) -> None:
    """Let a model that was not loaded save its vision tower under the names of transformers 4.57, which 5 reads too.

    transformers 5 does so for a model that it has loaded; one that `from_config` made would get names that 4.57 takes
    for missing weights. A ViT of timm has the names of 4.57 already; the conversion that transformers 5 has for it
    would shorten them (seen with 5.24).
    """
    _forget_unused_conversions(model)
    if get_model_conversion_mapping is None or getattr(model, "_weight_conversions", None):
        return
    known: Any = get_model_conversion_mapping(model, add_legacy=False)
    towers: Any = [each for each in known if (getattr(each, "scope_prefix", None) or "").endswith("vision_tower")]
    ours: Any = [each for each in towers if not getattr(each, "prefix_to_add", None)]
    if ours:
        model._weight_conversions = ours


def accept_checkpoint_names(vision_tower: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """Let `load_state_dict` read a vision tower under the names that checkpoints and adapters have.

    Those of transformers 4.57 hold a `vision_model` that 5.x lacks. from_pretrained and save_pretrained translate;
    Trainer does not when it resumes, and would keep the tower as it was (huggingface/transformers#43701), and PEFT
    does not when it loads an adapter.
    """
    inner = f"{prefix}vision_model."
    has_inner = "vision_model" in vision_tower._modules
    foreign = [name for name in state_dict if name.startswith(prefix) and name.startswith(inner) != has_inner]
    if not foreign:
        return
    complete = _names_without_adapter(vision_tower)
    for name in foreign:
        own = name.removeprefix(prefix if has_inner else inner)
        own = f"vision_model.{own}" if has_inner else own
        state_dict[prefix + complete.get(own, own)] = state_dict.pop(name)


def _names_without_adapter(module: nn.Module) -> dict[str, str]:
    """Map `layer.lora_A.weight` to `layer.lora_A.default.weight`, as PEFT does for names it knows.

    Of several adapters the last one counts, which is the one that is being loaded.
    """
    names = {}
    for name in module.state_dict():
        path = name.split(".")
        adapter = next((index for index, part in enumerate(path) if part.startswith("lora_")), None)
        if adapter is not None and len(path) > adapter + 1:
            names[".".join(path[: adapter + 1] + path[adapter + 2 :])] = name
    return names
