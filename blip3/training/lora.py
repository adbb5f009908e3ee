# SPDX-License-Identifier: Apache-2.0
"""Adapters on the language model (LoRA, arXiv:2106.09685, by PEFT), and the complete model they make in the end.

    model --add_adapters--> PEFT's, of which the adapters alone learn
    OUTPUT/adapter/         the adapters by themselves
    OUTPUT/final/           write_merged: weights with the adapters added, code, processor; loads without PEFT

The output layer takes none: what reads its weights would pass an adapter by. In the release's layout the linear layers
are qkv_proj, o_proj, gate_up_proj and down_proj; in the unfused one seven. On Phi-3-mini 2.5 % of the language model's
weights, the share the report gives, are rank 61 in the first and 51 in the second; on the shipped small model rank 4.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import folder_of, load_model, locate
from ..refusals import install
from .recipe import LoraSettings, RecipeError

logger = logging.getLogger(__name__)


def add_adapters(model: Any, settings: LoraSettings, name: str) -> Any:
    """Wrap a model so that new adapters of its language model learn, and nothing else.

    Args:
        model: whole; changed in place.
        settings: of the recipe.
        name: of the checkpoint, which the adapters' configuration repeats.

    Returns:
        PEFT's model. Before the first step it gives the same as the model did.

    Raises:
        ImportError: without PEFT.
        RecipeError: if the language model has none of the layers.
    """
    config = lora_config(settings)
    from peft import get_peft_model

    present = [path for path, _ in model.language_model.named_modules() if path.rpartition(".")[2] in settings.targets]
    if not present:
        raise RecipeError(
            f"lora targets {', '.join(settings.targets)} but the language model has no layer of these names. They are "
            "probably those of the other text layout: remove the key to take all linear layers."
        )
    wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = name
    adapters, weights = count_weights(wrapped)
    logger.warning(
        "Training adapters of rank %d on %d layers: %s weights, %.2f %% of the language model's %s.",
        settings.rank,
        len(present),
        f"{adapters:,}",
        100 * adapters / weights,
        f"{weights:,}",
    )
    return wrapped


def lora_config(settings: LoraSettings) -> Any:
    """Translate a recipe's settings for PEFT.

    Raises:
        ImportError: without PEFT.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError(
            f"Adapters of rank {settings.rank} need the package peft, which is not installed. The extra was probably "
            f"left out: run {install('train')}."
        ) from error
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf".*\.language_model\..*\.({'|'.join(settings.targets)})",
    )


def count_weights(model: Any) -> tuple[int, int]:
    """Count the weights of adapters, and those of the language model without them, embeddings but no output layer."""
    named = list(base_of(model).language_model.named_parameters())
    adapters = sum(_size(parameter) for name, parameter in named if "lora_" in name)
    return adapters, sum(_size(parameter) for _, parameter in named) - adapters


def _size(parameter: torch.Tensor) -> int:
    """Count weights; bitsandbytes packs two into a byte, and ZeRO-3 leaves none where it took the shards out."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def base_of(model: Any) -> Any:
    """Take the wrapper of DDP or DeepSpeed off; what is left is PEFT's model, or the model itself."""
    from accelerate.utils import extract_model_from_parallel

    return extract_model_from_parallel(model)


def loading_options(settings: LoraSettings | None, bf16: bool, fsdp: bool) -> tuple[torch.dtype, dict[str, Any]]:
    """Say how to load a model that is to be trained.

    Weights that learn are float32. Frozen ones take half the memory in bfloat16, in which mixed precision computes
    anyway; under FSDP2 a layer's weights have one type.

    Returns:
        their type, and further arguments of `from_pretrained`.

    Raises:
        ImportError: for 4 bits without bitsandbytes.
    """
    if settings is None or settings.quantize is None:
        return torch.bfloat16 if settings and bf16 and not fsdp else torch.float32, {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"lora has quantize {settings.quantize!r}, which needs the package bitsandbytes, and it is not installed. "
            f"The extra was probably left out: run {install('quantize')}."
        ) from error
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if bf16 else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["vision_tower", "resampler", "lm_head"],
    )
    return dtype, {"quantization_config": quantization}


def write_merged(checkpoint: str | Path, adapter: Path, output: Path) -> None:
    """Add adapters to the weights they were trained on, in float32, and write the whole model.

    The weights are rounded to the checkpoint's own type, and so are those that no adapter changed: they stay as they
    were.

    Args:
        checkpoint: that training began with, as `checkpoints.locate` takes it.
        adapter: folder that PEFT wrote.
        output: folder for the model; code and processor are not written.
    """
    from peft import PeftModel

    model = load_model(locate(checkpoint), dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.to(stored_dtype(checkpoint)).save_pretrained(output)


def stored_dtype(checkpoint: str | Path) -> torch.dtype:
    """Give the type of a checkpoint's weights, as its config.json says; float32 if it says nothing."""
    config = json.loads((folder_of(checkpoint) / "config.json").read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, name.removeprefix("torch."))
