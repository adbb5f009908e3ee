# SPDX-License-Identifier: Apache-2.0
"""Detectors of a few thousand random weights, as folders that `from_pretrained` loads, and stages run in a row."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from blip3.engines.stages import EnginePlan, Sample
from support import IS_TRANSFORMERS_5

WORDS = [f"w{number}" for number in range(320)]
"""What the tokenizers of the Grounding DINO models know."""
_SWIN = {
    "window_size": 7,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
    "image_size": 64,
    "out_features": ["stage2", "stage3", "stage4"],
    "out_indices": [2, 3, 4],
}
_GROUNDING = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 12,
    "encoder_n_points": 2,
    "decoder_n_points": 2,
    "use_timm_backbone": False,
}
_TRANSFORMER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_grounding_dino(folder: Path, name: str = "GroundingDino") -> Path:
    """Write a model of the class `name`ForObjectDetection with its tokenizer and image processor."""
    vocabulary = ["[PAD]", *(f"[unused{number}]" for number in range(1, 1030)), *WORDS]
    for token, place in {"[UNK]": 100, "[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}.items():
        vocabulary[place] = token  # where the model looks for them
    tokenizer = Tokenizer(
        models.WordPiece({token: place for place, token in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    text = {"model_type": "bert", "max_position_embeddings": 256, "vocab_size": len(vocabulary), **_TRANSFORMER}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=transformers.SwinConfig(**_SWIN), text_config=text, **_GROUNDING
    )
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    processor = _processor("GroundingDinoImageProcessor")(size={"shortest_edge": 96, "longest_edge": 192})
    return _save(folder, model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), processor)


def write_owlv2(folder: Path) -> Path:
    """Write an OWLv2 model whose tokenizer reads letter by letter."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: place for place, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    ends = [("<|startoftext|>", len(vocabulary) - 2), ("<|endoftext|>", len(vocabulary) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", None, ends)
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "!"}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, **_TRANSFORMER}
    text |= {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 8, **_TRANSFORMER}
    config = transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    processor = _processor("Owlv2ImageProcessor")(size={"height": 32, "width": 32})
    return _save(
        folder,
        transformers.Owlv2ForObjectDetection(config),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        processor,
    )


def _processor(name: str) -> Any:
    return getattr(transformers, f"{name}Pil" if IS_TRANSFORMERS_5 else name)


def _save(folder: Path, model: torch.nn.Module, tokenizer: Any, processor: Any) -> Path:
    """Save it all, with weights large enough that queries, tags and images differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not (parameter.dim() == 1 and name.endswith("weight")):  # norms stay
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def run_stages(plan: EnginePlan, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Run a plan's stages in this process and give each sample's values; what is dropped sees no later stage."""
    values = [dict(sample.values) for sample in samples]
    for spec in plan.stages:
        stage = spec.stage(**spec.options)
        left = [index for index, value in enumerate(values) if not {"error", "filtered_by"} & set(value)]
        given = [replace(samples[index], values=values[index]) for index in left]
        added = stage(given, [images[index] for index in left] if stage.needs_images else []) if left else []
        for index, value in zip(left, added, strict=True):
            values[index] |= value
    return values
