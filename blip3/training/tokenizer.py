# SPDX-License-Identifier: Apache-2.0
"""The small model's tokenizer: byte-pair merges of the words it uses, single characters for all it reads.

A word after a space is merged as far as training texts suggest. Everything else stays single characters: what a page
shows comes first in an answer or in quotes, with no space before it, so that reading "Rabbit" and "7KQ2" are the same
task and a string never seen before costs no more than a known one.
"""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
TURN_MARKERS = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
IMAGE_TOKENS = ("<image>", "<image placeholder>", "<|endofchunk|>")
_UNITS = rf"{SPACE}[a-z]+|[A-Z][a-z]+(?=[{SPACE}:])|</?[a-z]+>|\]?\[0\.|,{SPACE}0\.|[\s\S]"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer.

    Args:
        texts: what the model will read and write, without markers.
        vocab_size: at most so many tokens, the 256 bytes for unknown characters and the markers included.

    Returns:
        a tokenizer with the release's markers: `<s>`, `<|endoftext|>`, `<pad>`, the chat and the image tokens.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    num_markers = len(TURN_MARKERS) + len(IMAGE_TOKENS) + 2
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(_UNITS), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_markers,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        initial_alphabet=[chr(code) for code in range(33, 127)] + [SPACE, "\n"],
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    trained = _without_added(trained, set(byte_tokens))
    trained.model.byte_fallback = True
    trained.model.unk_token = "<unk>"
    trained.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    trained.add_special_tokens([AddedToken("<|endoftext|>", normalized=False), AddedToken("<pad>", normalized=False)])
    trained.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in TURN_MARKERS])
    trained.add_special_tokens([AddedToken(token, normalized=False) for token in IMAGE_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={"image_token": "<image>"},
    )


def _without_added(tokenizer: Tokenizer, contents: set[str]) -> Tokenizer:
    """Copy a tokenizer in which these tokens are plain entries of the vocabulary.

    The trainer gives the bytes the first ids as special tokens. Decoding without special tokens would drop them, and
    with them every character outside the alphabet.
    """
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in contents]
    return Tokenizer.from_str(json.dumps(values))
