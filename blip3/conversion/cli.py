# SPDX-License-Identifier: Apache-2.0
"""Convert released BLIP-3 / xGen-MM weights (r-v1.5 and r-v1) to this repository's names, and back.

    python convert_weights.py RELEASE OUTPUT                     released folder or LAVIS .pt -> our folder
    python convert_weights.py TRAINED OUTPUT --base OURS         saved by transformers or TRL -> complete again
    python convert_weights.py OURS ORIGINAL --to-original        our folder -> released names
    python convert_weights.py --vision TOWER --text PHI3 OUTPUT  starting point of pre-training

A conversion reads headers, plans every output tensor as row ranges of source tensors, and streams the data once when
it writes. The parts are in this package, whose docstring gives the order to read them in.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from ..files import only_writer, write_json
from . import quantized
from .card import size_line, write_attributes, write_card
from .configs import Checkpoint, optional_json, original_configs, read_json
from .names import EMBEDDING, FOLDED, IMAGE_TOKENS, to_ours
from .output_folder import (
    plan_ours,
    verify_bits,
    verify_model,
    write_original_files,
    write_shards,
    write_small_files,
)
from .replace import check_space, prepare_output, replacing
from .sources import from_backbones, from_ours, from_release
from .tensors import (
    SEED,
    InitialisedReader,
    Views,
    cast,
    progress_bar,
    total_bytes,
    unfold,
    write_safetensors,
)
from .tokenizer_files import TOKENIZER_FILES, present_files
from .towers import to_open_clip

MERGE = (
    'python -c "from peft import PeftModel; from transformers import AutoModelForImageTextToText as Auto; PeftModel.'
    "from_pretrained(Auto.from_pretrained('{base}', trust_remote_code=True, dtype='auto'), '{adapter}')"
    ".merge_and_unload().save_pretrained('MERGED')\""
)


def main(argv: list[str] | None = None) -> int:
    """Convert; return 0, or 1 after printing an error."""
    args = parse_args(argv)
    try:
        with only_writer(args.output):
            convert(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert(args: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        FileNotFoundError: if something is missing.
        ValueError: if a source, an option or OUTPUT is refused.
    """
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    sources = [path for path in (args.source, args.vision, args.text, args.tokenizer, args.base) if path]
    prepare_output(args.output, sources)
    try:
        checkpoint = load_source(args)
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ValueError(
            f"{' and '.join(map(str, sources))} cannot be read ({reason}). A JSON file there probably holds a value "
            "of another kind than expected, a text in place of a number or a list in place of an object: download the "
            "small files again, or compare them with the release's."
        ) from error
    if checkpoint.quantization is not None:
        write_quantized(checkpoint, args)
    else:
        (write_original if args.to_original else write_ours)(checkpoint, args, dtype)


def parse_size(text: str) -> int:
    """Return a size in bytes.

    >>> parse_size("5GB"), parse_size("2GiB"), parse_size("100")
    (5000000000, 2147483648, 100)

    Raises:
        argparse.ArgumentTypeError: if the text is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ") if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected a number with a unit, such as 5GB or 500MiB")
    return int(size)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="convert_weights.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="SOURCE OUTPUT; with --text OUTPUT")
    add = parser.add_argument
    add("--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="default: %(default)s")
    add("--max-shard-size", type=parse_size, default="5GB", help="bytes, with unit; default: %(default)s")
    add(
        "--text-layout",
        choices=("fused", "unfused"),
        help="unfused: mistral; default: fused as phi3, or as SOURCE if ours",
    )
    add(
        "--vision-config",
        type=Path,
        metavar="FILE",
        help="sizes of the tower; default: siglip_vision_config.json or open_clip_config.json of SOURCE, as released",
    )
    add("--verify", action="store_true", help="read everything back and compare; default: off")
    add("--to-original", action="store_true", help="SOURCE is ours, write released names; default: off")
    add("--variant", "--flavour", choices=("auto", "instruct", "base"), default="auto", help="default: %(default)s")
    add("--tokenizer", type=Path, metavar="DIR", help="default: beside the weights")
    add("--source-config", type=Path, metavar="FILE", help="original config.json; default: beside the weights")
    add("--base", type=Path, metavar="DIR", help="our folder SOURCE was trained from; gives what SOURCE lacks")
    add("--base-model", action="append", metavar="ID", help="on the Hub, for the card; default: if recognised")
    add("--license", metavar="ID", help="of the weights, for the card; default: the release's if recognised")
    add("--vision", type=Path, metavar="DIR", help="SigLIP, CLIP or a ViT of timm; default: none")
    add("--text", type=Path, metavar="DIR", help="Phi-3; default: none")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; usage errors exit with code 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    num_paths = 1 if args.text else 2
    if args.text and not args.vision:
        parser.error("--text needs --vision: the two together make a starting point")
    if len(args.paths) != num_paths:
        expected = "OUTPUT" if args.text else "SOURCE OUTPUT"
        parser.error(f"{len(args.paths)} paths given, {num_paths} expected ({expected})")
    if args.to_original and args.text_layout:
        parser.error("--text-layout is for our layout; --to-original always writes the released one")
    if args.base and num_paths == 1:
        parser.error("--base is for a SOURCE that was trained from it; leave it out")
    args.output, args.source = args.paths[-1], args.paths[0] if num_paths == 2 else None
    return args


def load_source(args: argparse.Namespace) -> Checkpoint:
    """Read whichever kind of source was given.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if it is not a source of that kind.
    """
    given = [
        vars(args)[name]
        for name in ("source", "base", "vision", "text", "tokenizer", "vision_config", "source_config")
    ]
    for path in given:
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; expected a local file or folder (nothing is downloaded). It is probably "
                "misspelt or relative to another folder: check the path."
            )
    if args.source is None:
        return from_backbones(args)
    refuse_adapter(args)
    config = optional_json(args.source / "config.json")
    is_ours = config is not None and config.get("model_type") == "blip3"
    if args.to_original and not is_ours:
        raise ValueError(
            f"{args.source} is no folder with a config.json of model_type 'blip3', which --to-original starts from. "
            "It is probably already in the original layout: leave --to-original out to convert it to ours."
        )
    ignored = [name for name in ("vision", "vision_config", "source_config") if vars(args)[name] is not None]
    if is_ours and ignored:
        raise ValueError(
            f"{args.source} is one of our folders and --{ignored[0].replace('_', '-')} was given too; such a folder "
            "describes itself. The option is for original checkpoints: leave it out."
        )
    check_base(args, is_ours)
    return from_ours(args) if is_ours else from_release(args)


def check_base(args: argparse.Namespace, is_ours: bool) -> None:
    """Refuse a --base that cannot complete SOURCE.

    Raises:
        ValueError: if SOURCE describes itself otherwise, or --base is not one of our folders.
    """
    if args.base is None:
        return
    config = optional_json(args.base / "config.json")
    if not is_ours or config is None or config.get("model_type") != "blip3":
        which = args.base if is_ours else args.source
        raise ValueError(
            f"--base {args.base} was given with SOURCE {args.source}, but {which} has no config.json of model_type "
            "'blip3'. --base is the converted folder that SOURCE was trained from: pass that, or leave it out."
        )


def refuse_adapter(args: argparse.Namespace) -> None:
    """Refuse a LoRA adapter, which is no model, with the line that makes it one.

    Raises:
        ValueError: if SOURCE holds an adapter and no weights of a model.
    """
    source = args.source
    if not (source / "adapter_config.json").is_file() or any(source.glob("model*.safetensors")):
        return
    base = args.base or read_json(source / "adapter_config.json").get("base_model_name_or_path") or "BASE"
    raise ValueError(
        f"{source} holds a LoRA adapter (adapter_config.json) and no weights of a model. It was probably saved by "
        f"PEFT before merging: run  {MERGE.format(base=base, adapter=source)}  and convert MERGED with --base {base}."
    )


def write_ours(checkpoint: Checkpoint, args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """Write our folder, in `dtype` or, if None, in each tensor's own.

    Raises:
        ValueError: if the disk is too small, a value does not fit the dtype, or what was written differs.
    """
    text_layout = args.text_layout or checkpoint.text_layout
    views = cast(plan_ours(checkpoint, text_layout), dtype)
    report(checkpoint, views, text_layout)
    total = total_bytes(views) + total_bytes(checkpoint.unused)
    check_space(args.output, total)
    changed = checkpoint.dtype_changed or any(
        part.reader.specs[part.name].dtype != view.dtype for view in views.values() for part in view.parts
    )
    stored = str(views["model.language_model.embed_tokens.weight"].dtype).removeprefix("torch.")
    with replacing(args.output) as folder:
        config = write_small_files(folder, checkpoint, text_layout, stored, size_line(views, stored), args)
        original = folder / "original"
        original.mkdir()
        write_original_files(original, checkpoint.small_files)
        with progress_bar(total, "write") as progress:
            write_shards(folder, views, args.max_shard_size, progress)
            if checkpoint.unused:
                state = "changed" if changed else "kept"
                path = original / "unused.safetensors"
                write_safetensors(path, checkpoint.unused, progress, weights_dtype=state)
        if args.verify:
            verify_bits(folder, views)
            verify_model(config, views)
    print(f"wrote {len(views)} tensors, {total_bytes(views)} bytes, to {args.output}")


def write_quantized(checkpoint: Checkpoint, args: argparse.Namespace) -> None:
    """Complete a folder that a quantized model saved; its weights stay as they are.

    Raises:
        ValueError: if the weights were to be changed, the disk is too small, or the method is not known.
    """
    if args.to_original or args.text_layout or args.dtype != "keep":
        raise ValueError(
            f"{checkpoint.description} holds weights quantized by {checkpoint.quantization}, which have neither "
            "another dtype nor another layout. It was probably meant to be quantized afterwards: convert the folder "
            "it was loaded from with these options, and quantize that."
        )
    check_space(args.output, sum(path.stat().st_size for path in quantized.weights_files(args.source)))
    with replacing(args.output) as folder:
        dtype = checkpoint.config.get("dtype", "float32")
        size = quantized.size_line(checkpoint, args.source)
        write_small_files(folder, checkpoint, checkpoint.text_layout, dtype, size, args)
        quantized.add_requirements(folder, str(checkpoint.quantization))
        quantized.copy_weights(args.source, folder, args.verify)
    print(f"completed {checkpoint.description}, quantized by {checkpoint.quantization}, as {args.output}")


def report(checkpoint: Checkpoint, views: Views, text_layout: str) -> None:
    """Print what happens to the tensors."""
    folded = [name for name in FOLDED if len(checkpoint.views[name].parts) > 1]
    split = sum(("qkv_proj" in name or "gate_up_proj" in name) for name in checkpoint.views)
    print(f"{checkpoint.description}: variant {checkpoint.variant}, {len(checkpoint.views)} tensors used")
    print(f"renamed {sum(to_ours(name) != name for name in checkpoint.views)} tensors")
    print(f"folded {len(folded)}: {', '.join(folded) or 'none'}")
    print(f"split {split if text_layout == 'unfused' else 0} fused text projections; {len(views)} tensors to write")
    initialised = sum(isinstance(part.reader, InitialisedReader) for view in views.values() for part in view.parts)
    print(f"initialised {initialised} tensors or row ranges (seed {SEED})" if initialised else "initialised none")
    names = ", ".join(sorted(checkpoint.unused)) or "none"
    print(f"kept aside {len(checkpoint.unused)} unused in original/unused.safetensors: {names}")


def check_original_form(config: dict) -> bool:
    """Refuse a model that neither r-v1.5's code nor r-v1's computes; return whether it is r-v1's, with a CLIP tower.

    Raises:
        ValueError: if tower and resampler do not belong to one of the two.
    """
    tower, resampler = config["vision_config"]["model_type"], config["resampler_config"]
    hides, asks = resampler.get("hide_padding", True), bool(resampler.get("num_text_queries"))
    is_first = tower == "clip_vision_model" and not hides
    if not is_first and (tower != "siglip_vision_model" or not hides or asks):
        raise ValueError(
            f"The model has a {tower}, hide_padding {hides} and num_text_queries {int(asks)}, but the original "
            "layouts are SigLIP with hidden padding (r-v1.5) and CLIP that reads it (r-v1). It was probably built "
            "anew from parts: it has no original form."
        )
    return is_first


def write_original(checkpoint: Checkpoint, args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """Write the released layout from ours, in `dtype` or, if None, in each tensor's own.

    Raises:
        ValueError: if the vocabulary has no original form, and as `write_ours`.
    """
    vocab, num_ids = checkpoint.config["text_config"]["vocab_size"], checkpoint.config["image_token_id"]
    if vocab != num_ids + len(IMAGE_TOKENS):
        raise ValueError(
            f"text_config.vocab_size is {vocab}, but the original layout holds exactly 3 ids from image_token_id "
            f"{num_ids} on. The vocabulary was probably resized after conversion: it has no original form."
        )
    is_clip = check_original_form(checkpoint.config)
    stored = dtype or checkpoint.views[EMBEDDING].dtype
    files, num_dead_rows = original_configs(checkpoint, stored)
    unused = checkpoint.unused
    if checkpoint.dtype_changed:  # the pooling head was kept as released; it follows the tower it belongs to
        unused = cast(unused, checkpoint.views["vision_encoder.post_layernorm.weight"].dtype)
    views, lost = unfold(checkpoint.views, unused, num_ids, num_dead_rows)
    views = to_open_clip(views) if is_clip else views
    views = cast({"vlm." + name: view for name, view in sorted(views.items())}, dtype)
    lost += [f"{name} (rebuilt)" for name in files if name not in checkpoint.small_files]
    tokenizer = {name: path for name, path in checkpoint.small_files.items() if name not in files}
    if "tokenizer.json" not in tokenizer:
        tokenizer |= present_files(checkpoint.tokenizer, TOKENIZER_FILES)
        lost += ["tokenizer files (ours copied)" if tokenizer else "tokenizer files (none found)"]
    check_space(args.output, total_bytes(views))
    with replacing(args.output) as folder:
        for name, content in files.items():
            write_json(folder / name, content)
        write_original_files(folder, tokenizer)
        write_card(folder, checkpoint, args, size_line(views, str(stored).removeprefix("torch.")))
        write_attributes(folder)
        with progress_bar(total_bytes(views), "write") as progress:
            write_shards(folder, views, args.max_shard_size, progress)
        if args.verify:
            verify_bits(folder, views)
    print(f"wrote {len(views)} tensors in the original layout to {args.output}")
    print("not restored: " + ("; ".join(lost) if lost else "nothing, everything is as in the original"))


if __name__ == "__main__":
    sys.exit(main())
