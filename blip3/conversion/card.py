# SPDX-License-Identifier: Apache-2.0
"""What a stranger on the Hub reads: the card, the notice beside the licence, and which files Git stores as large.

In: a `Checkpoint` and the options of the command. Out: README.md, NOTICE and .gitattributes, without a local path.
"""

import argparse
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..files import write_text
from ..hub import model_code
from .configs import TEMPLATES, Checkpoint
from .tensors import Views, total_bytes

MARK = "Written by `convert_weights.py`"
CODE_LICENSE = "apache-2.0"
# Every release, as its own card names and licenses it; those of r-v1 had another name at first.
RELEASES = {
    f"xgen-mm-phi3-mini-{kind}-r-v1.5": ("Salesforce", "apache-2.0")
    for kind in ("base", "instruct-singleimg", "instruct-interleave", "instruct-dpo")
} | {
    f"{name}-phi3-mini-{kind}-r-v1": ("Salesforce", "cc-by-nc-4.0")
    for name in ("xgen-mm", "blip3")
    for kind in ("base", "instruct")
}
PARTS = {
    "DFN5B-CLIP-ViT-H-14-378": ("apple", "other"),
    "siglip-so400m-patch14-384": ("google", "apache-2.0"),
    "Phi-3-mini-4k-instruct": ("microsoft", "mit"),
}
LARGE_TEXT = 10 * 2**20  # bytes; the Hub takes a larger text file as a large file only
BY_NAME = " (so its folder was named; its checksums were not compared)"
LARGE = "filter=lfs diff=lfs merge=lfs -text"

LOADING = """```python
# transformers 4.57 and 5.x
from transformers import AutoModelForImageTextToText, AutoProcessor

repository, revision = "<owner>/<name>", "<commit>"
processor = AutoProcessor.from_pretrained(repository, revision=revision, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(
    repository, revision=revision, trust_remote_code=True, dtype="auto"
)
```

`trust_remote_code=True` runs the `.py` files of the repository. `revision` pins the commit whose code you have read,
so that a later push cannot change what runs."""

CHAT_PROMPT = """One turn; `<image>` stands where each image belongs, and `apply_chat_template` writes the form:

```python
content = [{"type": "image", "path": "street.jpg"}, {"type": "text", "text": "What is this?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device, model.dtype)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```"""
RELEASED_PROMPT = """
The text the model reads, with the system message of its training:

```
<|system|>
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.<|end|>
<|user|>
<image>
What is this?<|end|>
<|assistant|>
```
"""  # noqa: E501
BASE_PROMPT = """The checkpoint continues documents; it was not trained to chat and has no chat template. Few-shot
prompts interleave images with their texts, each chunk ended by `<|endofchunk|>`:

```python
prompt = "<image>A red door.<|endofchunk|><image>"
inputs = processor(text=prompt, images=["street.jpg", "harbour.jpg"], do_image_splitting=False, return_tensors="pt")
ids = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=32, do_sample=False)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```"""

BODY = """
# {title}

{what}

The code in this folder runs it on transformers 4.57 and 5.x: batches, caches, beams, `Trainer`, PEFT, and `handler.py`
for Hugging Face Inference Endpoints.

| | |
|---|---|
| weights | {size} |
| image tokens an image takes | {tokens} |
| context | {context:,} tokens |

## Load

{loading}

## Prompt

{prompt}

## Limits

- It can be wrong, biased and unsafe, and describe what is not in the image. Check its answers before relying on them.
- Images are seen at tiles of {side} pixels; smaller print is lost.
- {language}
- A conversion changes names and layout of the weights, not their values, unless it changes their dtype. It was not
  scored on public benchmarks.

## How it was made

{mark}, a script of the open BLIP-3 repository, from {source}:

    {command}

The paper is [arXiv:2408.08872](https://arxiv.org/abs/2408.08872). {licence}
"""
ORIGINAL_BODY = """
# {title}, original layout

{what} The tensors have their original names, without code to run them.

{mark} from {source}:

    {command}

{licence}
"""


@dataclass(frozen=True)
class Origin:
    """Where the weights come from, as far as it is known.

    Attributes:
        base_models: ids on the Hub.
        license: of the weights, as the Hub writes it; None where nothing tells.
        is_release: the weights are those of the one base model, unchanged.
        is_by_name: it was recognised by the folder's name alone.
    """

    base_models: tuple[str, ...] = ()
    license: str | None = None
    is_release: bool = False
    is_by_name: bool = False


def released_origin(path: Path, release: str | None, variant: str) -> Origin:
    """Recognise a release by its checksums, else by the folder's name or its place in the Hub's cache.

    Args:
        path: the source.
        release: name of the release whose checksums were those of the source, or None.
        variant: `instruct` or `base`; a name of the other one is not believed.
    """
    name = release or _named(path, RELEASES)
    if name is None or (release is None and ("-instruct-" in name) != (variant == "instruct")):
        return Origin()
    if name not in RELEASES:
        return Origin()
    owner, weights_license = RELEASES[name]
    if release is None:
        print(f"taken for {owner}/{name} by the folder's name; if it is not, say --base-model ID --license ID")
    return Origin((f"{owner}/{name}",), weights_license, is_release=True, is_by_name=release is None)


def parts_origin(vision: Path, text: Path) -> Origin:
    """Recognise the parts of a starting point by the folders' names."""
    names = [name for name in (_named(vision, PARTS), _named(text, PARTS)) if name]
    return Origin(tuple(f"{PARTS[name][0]}/{name}" for name in names))


def _named(path: Path, table: dict) -> str | None:
    """Return the name of the table that is the folder's, or a repository's in the Hub's cache."""
    parts = [part.split("--")[-1] for part in path.absolute().parts]
    candidates = {parts[-1], *(part for part, after in itertools.pairwise(parts) if after == "snapshots")}
    return next((name for name in table if name in candidates), None)


def card_origin(folder: Path, base: Path | None, is_as_written: bool) -> Origin:
    """Read where our folder comes from off its card, and what that leaves out off the card of its base.

    Args:
        folder: of ours, or saved by transformers from one.
        base: what it was trained from, if that was given.
        is_as_written: whether the weights are those this script wrote, not trained since.
    """
    models: tuple[str, ...] = ()
    weights_license, is_release, is_by_name = None, False, False
    for path in filter(None, (folder, base)):
        text, data = _read_card(path)
        found = tuple(filter(_is_id, _as_list(data.get("base_model"))))
        if not models and found:
            models, is_by_name = found, MARK in text and BY_NAME in text
            is_release = path is folder and is_as_written and MARK in text and "from the release" in text
        weights_license = weights_license or next(iter(_as_list(data.get("license"))), None)
    return Origin(models, weights_license, is_release, is_by_name)


def _read_card(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return a card and its header; not those by `Trainer`, TRL and PEFT, which name local folders as models."""
    if not (folder / "README.md").is_file():
        return "", {}
    text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        print(f"the head of {folder / 'README.md'} is no YAML of a card and is not read: {error}")
        return "", {}
    is_of_trainer = "generated_from_trainer" in _as_list(data.get("tags")) or data.get("library_name") == "peft"
    return ("", {}) if is_of_trainer and MARK not in text else (text, data)


def _as_list(value: Any) -> list[str]:
    """Return the texts of a value that a card may write as one text or as several."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


def _is_id(name: str) -> bool:
    """Tell an id on the Hub from a folder of the machine."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def given_origin(origin: Origin, args: argparse.Namespace) -> Origin:
    """Put the command line's --base-model and --license in place of what was recognised."""
    return Origin(
        tuple(args.base_model) if args.base_model else origin.base_models,
        args.license or origin.license,
        origin.is_release and not args.base_model,
        origin.is_by_name,
    )


# -- Files ------------------------------------------------------------------------------------------------------------


def size_line(views: Views, dtype: str) -> str:
    """Return the card's line about the weights, of which most have the dtype."""
    num_parameters = sum(view.num_bytes // view.dtype.itemsize for view in views.values())
    return f"{num_parameters:,} parameters in {dtype}, {total_bytes(views) / 1e9:.2f} GB"


def write_card(folder: Path, checkpoint: Checkpoint, args: argparse.Namespace, size: str) -> None:
    """Write README.md and NOTICE.

    Args:
        folder: with everything else written, but for weights.
        checkpoint: what to describe.
        args: the command line.
        size: the line about the weights.
    """
    origin, config = given_origin(checkpoint.origin, args), checkpoint.config
    body = (ORIGINAL_BODY if args.to_original else BODY).format(
        title=_title(origin),
        what=_what(origin, checkpoint),
        size=size,
        tokens=_token_line(config),
        context=config["text_config"]["max_position_embeddings"],
        loading=LOADING,
        prompt=_prompt(folder),
        side=config["vision_config"]["image_size"],
        language="It was trained on English."
        if origin.base_models
        else "Its languages are those of its training data.",
        mark=MARK,
        source=_source(origin),
        command=command_of(args, origin),
        licence=_licence(origin),
    )
    write_text(folder / "README.md", f"---\n{_header(origin)}\n---\n{body}")
    if not args.to_original:
        write_text(folder / "NOTICE", _notice(origin))


def _header(origin: Origin) -> str:
    data = ModelCardData(
        license=origin.license,
        base_model=list(origin.base_models) or None,
        language="en" if origin.base_models else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["blip3", "xgen-mm", "vision-language", "multi-image", "custom_code"],
    )
    return data.to_yaml()


def _token_line(config: dict[str, Any]) -> str:
    """Say how many tokens an image takes under each grid, and as its global view alone."""
    latents, sampling = config["resampler_config"]["num_latents"], config["resampler_config"]["token_sampling"]
    counts = model_code("tiling_blip3.list_image_token_counts")(config["tile_grids"], latents, sampling)
    if sampling == "fixed":
        return str(latents)
    with_tiles = [str(count) for count in counts if config["tile_grids"]]
    return ", ".join([*with_tiles, f"{latents} with `do_image_splitting=False`"])


def _title(origin: Origin) -> str:
    return (
        origin.base_models[0].split("/")[-1] + " for today's transformers" if origin.is_release else "BLIP-3 (xGen-MM)"
    )


def _what(origin: Origin, checkpoint: Checkpoint) -> str:
    kind = "reads images and text, and answers" if checkpoint.variant == "instruct" else "continues images and text"
    tower, family = _tower_and_family(checkpoint.config)
    what = f"BLIP-3 ({family}) {kind}: {tower}, a Perceiver resampler, and a language model of Phi-3's design."
    if checkpoint.config["resampler_config"].get("num_text_queries"):
        what += " Its image tokens depend on the question: each turn encodes its images again."
    if origin.is_release or not checkpoint.is_ours:
        return what
    return what + " These weights are not recognised as a release: they were probably trained further."


def _tower_and_family(config: dict[str, Any]) -> tuple[str, str]:
    """Name the vision tower and the family whose resampler the model has."""
    vision = config["vision_config"]
    towers = {"siglip_vision_model": "SigLIP", "clip_vision_model": "a CLIP tower"}
    is_first = not config["resampler_config"].get("hide_padding", True)
    family = "xGen-MM, r-v1" if is_first else "xGen-MM, r-v1.5"
    return towers.get(vision["model_type"], f"timm's {vision.get('architecture')}"), family


def _source(origin: Origin) -> str:
    models = " and ".join(f"[{name}](https://huggingface.co/{name})" for name in origin.base_models)
    if origin.is_release:
        return f"the release {models}" + (BY_NAME if origin.is_by_name else ", whose checksums it verified")
    return f"a checkpoint based on {models}" if models else "a checkpoint that it does not recognise as a release"


def _licence(origin: Origin) -> str:
    if origin.license is None:
        return (
            "Nothing told the script the licence of the weights; whoever publishes this folder adds it above. The "
            "code is under the Apache License 2.0 (LICENSE)."
        )
    return f"The weights are under `{origin.license}`, the code under the Apache License 2.0 (LICENSE, NOTICE)."


def _notice(origin: Origin) -> str:
    models = ", ".join(origin.base_models) or "a checkpoint that was not recognised as a release"
    terms = origin.license or "not known; it is that of the checkpoint"
    return (
        "BLIP-3, open\n\nThe .py files, the folder blip3/ and the chat template are under the Apache License 2.0 "
        "(LICENSE).\n\n"
        f"The weights and the tokenizer come from: {models}.\nLicence of the weights: {terms}.\nChanges: tensors were "
        "renamed, rows of added tokens were joined to the vocabulary, and the dtype\nmay have been converted.\n\n"
        "The releases of r-v1.5 were trained from SigLIP-SO400M (Google, Apache License 2.0), those of r-v1 from\n"
        "DFN5B CLIP ViT-H (Apple, a licence of its own), and all of them from Phi-3-mini (Microsoft, MIT).\n"
    )


def _prompt(folder: Path) -> str:
    template = folder / "chat_template.jinja"
    if not template.is_file():
        return BASE_PROMPT
    is_released = template.read_bytes() == (TEMPLATES / template.name).read_bytes()
    return CHAT_PROMPT + ("\n" + RELEASED_PROMPT.rstrip() if is_released else "")


def command_of(args: argparse.Namespace, origin: Origin) -> str:
    """Return the command, with a word in place of each path of the user's machine."""
    words = ["python convert_weights.py"]
    if args.source is not None:
        words.append(origin.base_models[0].split("/")[-1] if origin.is_release else "SOURCE")
    words.append("OUTPUT")
    for name in ("vision", "text", "tokenizer", "vision_config", "source_config", "base"):
        if getattr(args, name) is not None:
            words.append(f"--{name.replace('_', '-')} {name.upper()}")
    words += [f"--dtype {args.dtype}"] * (args.dtype != "keep")
    words += [f"--text-layout {args.text_layout}"] * (args.text_layout is not None)
    words += [f"--variant {args.variant}"] * (args.variant != "auto")
    words += ["--to-original"] * args.to_original + ["--verify"] * args.verify
    return " ".join(words)


def write_attributes(folder: Path) -> None:
    """Write .gitattributes: weights, and the tokenizer if it is large, go to Git's large file storage."""
    lines = [f"*.safetensors {LARGE}\n"]
    lines += [f"{path.name} {LARGE}\n" for path in sorted(folder.glob("*.json")) if path.stat().st_size > LARGE_TEXT]
    write_text(folder / ".gitattributes", "".join(lines))


# -- Paths of the user's machine --------------------------------------------------------------------------------------

_PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "local_files_only", "is_local")


def without_paths(content: Any) -> Any:
    """Return a JSON value without the keys under which transformers notes where a file was loaded from."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items() if key not in _PATH_KEYS}
    return [without_paths(value) for value in content] if isinstance(content, list) else content


def has_path(text: str) -> bool:
    """Tell whether a JSON text notes an absolute path under one of those keys."""
    return re.search(rf'"({"|".join(_PATH_KEYS)})"\s*:\s*"([/~\\]|[A-Za-z]:)', text) is not None
