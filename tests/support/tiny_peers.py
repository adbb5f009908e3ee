# SPDX-License-Identifier: Apache-2.0
"""Other vision-language models of transformers with random weights, a folder each, to test what must serve any."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

WORDS = ("red", "green", "blue", "a", "dog", "cat", "house", "is", "what", "?", ".", ":", "yes", "no")
SPECIAL = (
    "<unk>",
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
SIDE, PATCH = 28, 14


def make_tokenizer() -> Any:
    """A tokenizer of few words, with the markers of both models."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        },
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
    )


def language_config() -> LlamaConfig:
    """A language model of two layers."""
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
    )


def image_processor(module: str, name: str, **settings: Any) -> Any:
    """The image processor that needs no torchvision, under its name on this line of transformers."""
    found = getattr(transformers.models, module)
    return (getattr(found, f"{name}Pil", None) or getattr(found, name))(**settings)


def save_llava(folder: Path) -> None:
    """Save a LLaVA whose images take four tokens."""
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language_config(),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    LlavaProcessor(
        image_processor("clip", "CLIPImageProcessor", **sizes),
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def save_idefics(
    folder: Path, config_class: Any = Idefics3Config, model: Any = Idefics3ForConditionalGeneration
) -> None:
    """Save an Idefics3, or a SmolVLM of its kind, that sees whole images of one token."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = config_class(
        vision_config=tower, text_config=language_config(), image_token_id=SPECIAL.index("<image>"), scale_factor=2
    )
    model(config).save_pretrained(folder)
    images = image_processor(
        "idefics3",
        "Idefics3ImageProcessor",
        do_image_splitting=False,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
    )
    Idefics3Processor(images, make_tokenizer(), image_seq_len=1).save_pretrained(folder)


def save_smolvlm(folder: Path) -> None:
    """Save a SmolVLM, read by Idefics3's processor, as its first checkpoints are."""
    save_idefics(folder, SmolVLMConfig, SmolVLMForConditionalGeneration)


PEERS = {"llava": save_llava, "idefics3": save_idefics, "smolvlm": save_smolvlm}


def save_peer(name: str, folder: Path) -> None:
    """Save one of `PEERS`, with weights large enough that answers differ."""
    torch.manual_seed(0)
    PEERS[name](folder)
