# SPDX-License-Identifier: Apache-2.0
"""The small model's tokenizer: byte-pair merges of the words it uses, single characters for all it reads.

A word after a space is merged as far as training texts suggest. Everything else stays single characters: what a page
shows comes first in an answer or in quotes, with no space before it, so that reading "Rabbit" and "7KQ2" are the same
task and a string never seen before costs no more than a known one.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...conversion.names import IMAGE_TOKENS
from ...conversion.tokenizer_files import tokenizer_settings

SPACE = "\u2581"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>", "unk_token": "<unk>"}
MAX_LENGTH = 2048
TURN_MARKERS = ("<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
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
    settings = tokenizer_settings(SPECIAL_TOKENS, MAX_LENGTH)
    return PreTrainedTokenizerFast(tokenizer_object=trained, **settings)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with names that both transformers lines know."""
    tokenizer.backend_tokenizer.save(str(output / "tokenizer.json"))
    settings = tokenizer_settings(SPECIAL_TOKENS, MAX_LENGTH)
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _without_added(tokenizer: Tokenizer, contents: set[str]) -> Tokenizer:
    """Copy a tokenizer in which these tokens are plain entries of the vocabulary.

    The trainer gives the bytes the first ids as special tokens. Decoding without special tokens would drop them, and
    with them every character outside the alphabet.
    """
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in contents]
    return Tokenizer.from_str(json.dumps(values))
