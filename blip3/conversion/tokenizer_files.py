# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of each variant, and what depends on its ids.

In: the source's tokenizer.json and tokenizer_config.json. Out: the same files with `<pad>` and the image tokens at the
ids that the folded vocabulary gives them, and the ids that start, stop and pad generation.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from ..files import write_json, write_text
from ..refusals import list_names
from .configs import Checkpoint, optional_json
from .names import IMAGE_TOKENS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What `save_pretrained` adds to tokenizer_config.json: said already in other files, or known to one line only.
SAVED_BY_TRANSFORMERS = (
    "added_tokens_decoder",
    "auto_map",
    "backend",
    "image_token",
    "is_local",
    "local_files_only",
    "model_specific_special_tokens",
    "name_or_path",
    "processor_class",
    "chat_template",
)
LLAMA_SPACE = "\u2581"


def token_ids(tokenizer: dict) -> dict[str, int]:
    """Return the id of every token of a tokenizer.json."""
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return dict(tokenizer["model"]["vocab"]) | added


def count_ids(folder: Path, num_rows: int) -> int:
    """Return the number of ids of a text tokenizer, with `<pad>`.

    Args:
        folder: where the tokenizer is.
        num_rows: rows of the text model's embedding, which tell Phi-3-mini where there is no tokenizer.

    Raises:
        FileNotFoundError: if there is no tokenizer and the model is not Phi-3-mini.
    """
    tokenizer = optional_json(folder / "tokenizer.json")
    if tokenizer is not None:
        ids = token_ids(tokenizer)
        return max(ids.values()) + 1 + ("<pad>" not in ids)
    if num_rows != 32064:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json and the text model has {num_rows} embedding rows, not Phi-3-mini's "
            "32064, so the number of token ids is unknown. Pass the folder of its tokenizer with --tokenizer DIR."
        )
    return 32012  # Phi-3-mini: 32011 ids and <pad>


def added_token(content: str, token_id: int) -> dict:
    """Return a special token's entry in tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content} | flags


def build_tokenizer(tokenizer: dict, settings: dict, num_ids: int, variant: str) -> tuple[dict, dict]:
    """Return tokenizer.json and tokenizer_config.json of the output.

    `base` keeps the released pipeline, the "fast" tokenizer of the reference. `instruct` equals the "slow" tokenizer
    (legacy=False) that supervised training and its prompts used; see `_slow_pipeline`.

    Args:
        tokenizer: the source's tokenizer.json.
        settings: the source's tokenizer_config.json.
        num_ids: number of ids before the added ones; `<image>` gets this id.
        variant: `instruct` or `base`.

    Raises:
        ValueError: if the tokenizer has another number of ids.
    """
    tokenizer = json.loads(json.dumps(tokenizer))
    ids = token_ids(tokenizer)
    if "<pad>" not in ids:
        ids["<pad>"] = max(ids.values()) + 1
        tokenizer["added_tokens"].append(added_token("<pad>", ids["<pad>"]))
    present = [token for token in IMAGE_TOKENS if token in ids]
    if max(token_id for token, token_id in ids.items() if token not in IMAGE_TOKENS) + 1 != num_ids or present:
        raise ValueError(
            f"The tokenizer has {len(ids)} tokens up to id {max(ids.values())}{' with ' if present else ''}"
            f"{list_names(present)}, but the checkpoint has {num_ids} ids before <image>. It probably belongs to "
            "another model: pass the right one with --tokenizer DIR."
        )
    tokenizer["added_tokens"] += [added_token(token, num_ids + index) for index, token in enumerate(IMAGE_TOKENS)]
    special: dict[str, str] = {}
    for role, default in (("bos", "<s>"), ("eos", "<|endoftext|>"), ("pad", "<pad>"), ("unk", "<unk>")):
        token = default if role == "pad" else settings.get(f"{role}_token") or default  # Phi-3 itself pads with eos
        token = token["content"] if isinstance(token, dict) else token
        special |= {f"{role}_token": token} if token in ids else {}
    if variant == "instruct":
        _slow_pipeline(tokenizer, {*special.values(), *IMAGE_TOKENS})
    return tokenizer, tokenizer_settings(special, settings.get("model_max_length", 4096))


def tokenizer_settings(special: dict[str, str], max_length: int) -> dict:
    """Return a tokenizer_config.json in words that both transformers lines know.

    Args:
        special: the token of each role: `bos_token`, `eos_token`, `pad_token` and, where there is one, `unk_token`.
        max_length: the most tokens the model takes.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **special,
        "model_max_length": max_length,
        "extra_special_tokens": {"image_token": IMAGE_TOKENS[0]},
    }


def _slow_pipeline(tokenizer: dict, without_space: set[str]) -> None:
    r"""Rewrite a Llama-style tokenizer.json, in place, to give the ids of the slow tokenizer with legacy=False.

    That one puts one dummy space before the text, then cuts at added tokens, so no later segment gets one; it
    drops the dummy again when a special token follows, but not for the phi-3 markers. Here every added token is
    matched after normalization, so that the normalizer sees the whole text, where `\A` inserts the space. Spaces
    become the metasymbol only in the pre-tokenizer, after the markers have stripped the white space behind them.

    Two known differences. A text that is exactly one marker (or `</s>`) gets no dummy space: tokenizers normalizes
    the contents of added tokens too, with the same expression. The control characters U+001C to U+001F count as white
    space after a marker in Python's strip, and not here.
    """
    if tokenizer["model"].get("type") != "BPE" or LLAMA_SPACE not in tokenizer["model"]["vocab"]:
        print("warning: the tokenizer is not of the Llama kind; its pipeline is kept as it is", file=sys.stderr)
        return
    for token in tokenizer["added_tokens"]:
        token["normalized"] = True
    dropped = "|".join(re.escape(token) for token in sorted(without_space))
    every = "|".join(re.escape(token["content"]) for token in tokenizer["added_tokens"])
    tokenizer["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Replace", "pattern": {"String": LLAMA_SPACE}, "content": " "},
            {"type": "Replace", "pattern": {"Regex": rf"\A(?!\z|{dropped}|(?:{every})\z)"}, "content": LLAMA_SPACE},
        ],
    }
    metaspace = {"type": "Metaspace", "replacement": LLAMA_SPACE, "prepend_scheme": "never", "split": False}
    tokenizer["pre_tokenizer"] = metaspace
    first, second = ({"Sequence": {"id": letter, "type_id": index}} for index, letter in enumerate("AB"))
    template = {"type": "TemplateProcessing", "single": [first], "pair": [first, second], "special_tokens": {}}
    tokenizer["post_processor"] = template


def write_tokenizer(folder: Path, checkpoint: Checkpoint) -> dict[str, int]:
    """Write the tokenizer files into `folder`; warn when the source has none.

    Returns:
        the ids of the tokenizer built; nothing when the source has none, or has ours already, copied as it is.

    Raises:
        ValueError: see `build_tokenizer`.
    """
    source = checkpoint.tokenizer
    tokenizer = optional_json(source / "tokenizer.json")
    if tokenizer is None:
        print(
            f"warning: {source} has no tokenizer.json, so OUTPUT lacks tokenizer.json and tokenizer_config.json; pass "
            + ("--base DIR, the folder it was trained from" if checkpoint.is_ours else "--tokenizer DIR to add them"),
            file=sys.stderr,
        )
        return {}
    if checkpoint.is_ours and "<image>" in token_ids(tokenizer):
        _copy_ours(folder, checkpoint, tokenizer)
        return {}
    settings = optional_json(source / "tokenizer_config.json") or {}
    num_ids = checkpoint.config["image_token_id"]
    tokenizer, settings = build_tokenizer(tokenizer, settings, num_ids, checkpoint.variant)
    write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
    write_json(folder / "tokenizer_config.json", settings)
    return token_ids(tokenizer)


def _copy_ours(folder: Path, checkpoint: Checkpoint, tokenizer: dict) -> None:
    """Copy a tokenizer of ours, with the settings that both transformers lines read and nothing either adds.

    Raises:
        ValueError: if `<image>` has another id than in the model.
    """
    source, expected = checkpoint.tokenizer, checkpoint.config["image_token_id"]
    if (found := token_ids(tokenizer)["<image>"]) != expected:
        raise ValueError(
            f"The tokenizer of {source} gives <image> the id {found}, but the checkpoint's config says {expected}. It "
            "probably belongs to another model: pass the right one with --base or --tokenizer."
        )
    copy_files(folder, {"tokenizer.json": source / "tokenizer.json"})
    settings = optional_json(source / "tokenizer_config.json") or {}
    kept = {key: value for key, value in settings.items() if key not in SAVED_BY_TRANSFORMERS}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": {"image_token": "<image>"}}
    write_json(folder / "tokenizer_config.json", kept | fixed)


def stop_ids(checkpoint: Checkpoint, ids: dict[str, int]) -> dict:
    """Return bos, eos and pad ids: of the tokenizer written, else of the source's files.

    Raises:
        ValueError: if those files name no token that ends an answer.
    """
    text, generation = checkpoint.config["text_config"], checkpoint.generation
    stops = ["<|end|>", "<|endoftext|>"] if checkpoint.variant == "instruct" else ["<|endoftext|>"]
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {key: generation[key] if key in generation else text[key] for key in keys}
    eos = [ids[token] for token in stops if token in ids]
    if eos:
        found["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    elif found["eos_token_id"] == []:
        raise ValueError(
            "eos_token_id of the source's generation_config.json or config.json is an empty list, and the tokenizer "
            f"has none of {list_names(stops)}, but answers must end: expected a token id or a list of them. The file "
            "was probably edited: write the id of the token that ends an answer."
        )
    found["pad_token_id"] = ids.get("<pad>", found["pad_token_id"])
    found["bos_token_id"] = ids.get("<s>", found["bos_token_id"])
    return found


def present_files(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Return, by name, those of the files that the folder has."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def copy_files(folder: Path, files: dict[str, Path]) -> None:
    """Copy small files into `folder` under the given names."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
