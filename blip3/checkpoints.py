# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint and its code are: the one rule that every command follows.

    name --+--> a folder here -----------------+--> its files: config.json, tokenizer, weights
           |                                   |
           +--> owner/name: fetched from the   +--> its code: *_blip3.py beside them, or in the nearest folder above
                Hub, then a folder like any

This repository holds its small model at the root and base/ below: the code once. What is found goes to
`from_pretrained` as it is:

    AutoProcessor.from_pretrained(**locate("base"))
    load_model(locate("owner/name"))                   refuses files that lack a weight of the model
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from transformers import AutoModelForImageTextToText

from .hub import CODE_FILES, ROOT
from .refusals import list_names

RECIPES = ROOT / "recipes"
GOLDEN_FILE = "golden.safetensors"  # what a shipped model gives (evaluation/golden.py); no part of the model
SMALL_FILES = ("*.jinja", "*.json", "*.model", "*.py")
WHOLE_BYTES = 64 * 2**20  # of a file whose fingerprint is that of all its bytes
BLOCK_BYTES, STRIDE_BYTES = 2**16, 2**22  # of a larger one: what counts, and how far apart

_FINGERPRINTED = (".jinja", ".json", ".model", ".py", ".safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_OUTPUT_OF = {  # place of the output among a command's arguments
    "blip3.training.small.new_model": 1,
    "blip3.training.average": 0,
    "blip3.training.small.publish": 0,
    "convert_weights.py": -1,
}
_code_in_use: dict[str, tuple[Path, str]] = {}  # name of a folder -> the folder, and a digest of its code


def locate(checkpoint: str | Path, subfolder: str = "", *, only_small_files: bool = False) -> dict[str, Any]:
    """Find a checkpoint and its code, for `from_pretrained`.

    Args:
        checkpoint: a folder, or `owner/name` on the Hub.
        subfolder: of the checkpoint inside it.
        only_small_files: leave the weights on the Hub.

    Returns:
        `pretrained_model_name_or_path`, the folder with the code; `subfolder`, where in it the checkpoint is; and
        `trust_remote_code`.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or no code that goes with it.
        ValueError: if this process has loaded other code from a folder of the same name.
    """
    folder = folder_of(checkpoint, subfolder, only_small_files=only_small_files)
    code, inside = find_code(folder)
    if code is None:
        if _names_code_elsewhere(folder):
            return {"pretrained_model_name_or_path": str(folder), "subfolder": "", "trust_remote_code": True}
        raise FileNotFoundError(
            f"{folder} has a config.json but no {CODE_FILES[-1]}, and neither has a folder above it. A checkpoint "
            "needs the model's code beside it or above it. It was probably copied out of the repository without the "
            f"code: copy the {len(CODE_FILES)} files *_blip3.py of the repository into it."
        )
    _check_processor_above(folder, code)
    _check_code_is_alone(code)
    return {"pretrained_model_name_or_path": str(code), "subfolder": inside, "trust_remote_code": True}


def copy_code(source: Mapping[str, Any]) -> None:
    """Copy a checkpoint's model code into transformers' cache, as loading its model does, but load no weights.

    Args:
        source: as `locate` gives it.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    get_class_from_dynamic_module(f"{Path(CODE_FILES[-1]).stem}.__name__", source["pretrained_model_name_or_path"])


def load_model(source: Mapping[str, Any], dtype: Any = "auto") -> Any:
    """Load a checkpoint's model, and be sure that every weight is the checkpoint's.

    transformers initialises a weight that it does not find at random and only logs so.

    Args:
        source: as `locate` gives it.
        dtype: of torch; `auto` takes the checkpoint's.

    Raises:
        ValueError: if the files lack a weight of the model, or hold one that is none of its.
    """
    model, found = AutoModelForImageTextToText.from_pretrained(**source, dtype=dtype, output_loading_info=True)
    is_quantized = getattr(model, "is_quantized", False)  # whose files hold scales too, which are no weights
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"]) * (not is_quantized)
    if missing or unexpected:
        folder = Path(source["pretrained_model_name_or_path"], source.get("subfolder", ""))
        what = [
            f"{len(names)} weights {how} ({list_names(names)})"
            for names, how in ((missing, "are missing"), (unexpected, "are none of the model's"))
            if names
        ]
        raise ValueError(
            f"Of the {len(model.state_dict())} weights that the model in {folder} has, {' and '.join(what)} in its "
            "files. Weights that are missing would be random numbers. The download probably stopped early, or the "
            "files are another model's: download them again, or convert again with --verify."
        )
    return model


def folder_of(checkpoint: str | Path, subfolder: str = "", *, only_small_files: bool = False) -> Path:
    """Give the folder of a checkpoint's own files, absolute; a name on the Hub is fetched first.

    Args:
        checkpoint: a folder, or `owner/name` on the Hub.
        subfolder: of the checkpoint inside it.
        only_small_files: leave the weights on the Hub.

    Raises:
        FileNotFoundError: if it has no config.json.
    """
    name, folder = str(checkpoint), Path(os.path.abspath(checkpoint))
    is_there = folder.is_dir() or not _HUB_ID.fullmatch(name) or folder.parent.is_dir() or _makers_of(folder)
    if not is_there:
        folder = _fetch(name, only_small_files)
    folder = folder / subfolder
    if (folder / "config.json").is_file():
        return folder
    where = f"{name}/{subfolder}" if subfolder else name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The checkpoint {where!r} was asked for but {folder} is not there. A folder that "
            f"from_pretrained loads is expected, or owner/name on the Hub. {_advice(folder)}"
        )
    raise FileNotFoundError(
        f"The checkpoint {where!r} has no config.json but a checkpoint is a folder with one. {_advice(folder)}"
    )


def find_code(folder: Path) -> tuple[Path | None, str]:
    """Find the nearest folder with the model's code: the checkpoint's own or one above.

    Args:
        folder: of a checkpoint.

    Returns:
        that folder, and where in it the checkpoint is; None and nothing if there is no code.
    """
    for whole in dict.fromkeys((Path(os.path.abspath(folder)), folder.resolve())):
        for above in (whole, *whole.parents):
            if (above / CODE_FILES[-1]).is_file():
                return above, "" if above == whole else whole.relative_to(above).as_posix()
    return None, ""


def code_folder(folder: Path) -> Path:
    """Give the folder that holds a checkpoint's code; the checkpoint's own where its code is elsewhere or nowhere."""
    return find_code(folder)[0] or folder


def fingerprint(checkpoint: str | Path, subfolder: str = "") -> str:
    """Tell checkpoints apart by the names and the contents of their files.

    A file of more than `WHOLE_BYTES`, as shards of weights are, counts by its size, its end and a block in every
    `STRIDE_BYTES`: gigabytes need not be read before each run, and no trained module is small enough to lie between.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    return _fingerprint_of(folder_of(checkpoint, subfolder), _FINGERPRINTED)


def weights_fingerprint(checkpoint: str | Path) -> str:
    """Tell checkpoints apart by their files of weights alone, as `fingerprint` does.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    return _fingerprint_of(folder_of(checkpoint), (".safetensors",))


def _fingerprint_of(folder: Path, suffixes: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in suffixes and path.name != GOLDEN_FILE:
            digest.update(path.name.encode() + digest_of(path))
    return f"sha256:{digest.hexdigest()[:32]}"


def digest_of(path: Path) -> bytes:
    """Hash a small file whole, of a large one its size and blocks spread over it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(f"{size} ".encode())
        for start in (*range(0, size - BLOCK_BYTES, STRIDE_BYTES), size - BLOCK_BYTES):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return digest.digest()


# ------------------------------------------------------------------------------------------------- what may be wrong


def _fetch(name: str, only_small_files: bool) -> Path:
    """Download a repository of the Hub, or what is missing of it."""
    patterns = SMALL_FILES if only_small_files else (*SMALL_FILES, "*.safetensors")
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"The checkpoint {name!r} was asked for, which is no folder in {Path.cwd()}, and the Hub did not give it "
            f"({reason}). A folder that from_pretrained loads is expected, or owner/name on the Hub. It is probably "
            "misspelt, private or not downloaded yet while HF_HUB_OFFLINE is set: correct the name, or go online once."
        ) from error


def _advice(folder: Path) -> str:
    """Say what a missing folder probably is, and what to do."""
    if (folder / "final" / "config.json").is_file():
        return f"The folder of a whole run was probably meant to be its last part: name {folder.name}/final."
    makers = _makers_of(folder)
    if not makers:
        return "The path is probably misspelt, or the training has not saved yet: correct it."
    output = next(iter(makers))[0]
    state = "has begun and not ended" if any(output.glob("checkpoint-*")) else "has probably not been run"
    sources = " or ".join(dict.fromkeys(source for _, source, _ in makers))
    commands = "` or `".join(command for _, _, command in makers)
    return f"It is what {sources} makes, which {state}: run `{commands}` first."


def _makers_of(folder: Path) -> list[tuple[Path, str, str]]:
    """Find what makes a folder, among the recipes and the commands in their first lines.

    Returns:
        for each the folder it writes, the recipe's name or the command's, and the command.
    """
    found = [each for each in _commands() if folder == each[0] or each[0] in folder.parents]
    return sorted(set(found), key=lambda each: len(each[2]))  # the plainest command first


def _commands() -> Iterator[tuple[Path, str, str]]:
    """Give every folder that a recipe or a command in its comments writes, with its source and the command.

    Paths start at the current folder, as in a recipe.
    """
    for path in sorted(path for path in RECIPES.rglob("*.yaml") if path.name != "published.yaml"):  # saved by a run
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        comments = re.sub(r"\\\n#\s*", "", text)
        commands = re.findall(r"^#   ((?:python|torchrun) .*?)(?:  .*)?$", comments, flags=re.MULTILINE)
        for command in commands:
            words = shlex.split(command, comments=True)
            program = next((word for word in words if word in _OUTPUT_OF), None)
            overrides = [word.removeprefix("output=") for word in words if word.startswith("output=")]
            if program:
                given = words[words.index(program) + 1 :]
                yield Path(os.path.abspath(given[_OUTPUT_OF[program]])), program, command
            elif overrides:
                yield Path(os.path.abspath(overrides[-1])), f"the recipe {name}", command
        output = re.search(r"^output: (\S+)", text, flags=re.MULTILINE)
        if output:
            own = [command for command in commands if command.endswith(f" {name}")]
            command = own[-1] if own else f"python -m blip3.training.train {name}"
            yield Path(os.path.abspath(output[1])), f"the recipe {name}", command


def _names_code_elsewhere(folder: Path) -> bool:
    """Whether config.json itself says that the code is in a repository of the Hub."""
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {}).values()
    return any("--" in str(name) for name in names)


def _check_processor_above(folder: Path, code: Path) -> None:
    """Refuse what transformers 4.57 cannot load: it looks for processor_config.json without the subfolder."""
    name = "processor_config.json"
    is_transformers_5 = int(transformers.__version__.split(".")[0]) >= 5
    if not is_transformers_5 and (folder / name).is_file() and not (code / name).is_file():
        raise FileNotFoundError(
            f"{folder} takes its code from {code}, which has no {name}; transformers {transformers.__version__} looks "
            f"for it there. Only the code was probably moved up: copy {name} beside the code, or the code into the "
            "checkpoint."
        )


def _check_code_is_alone(code: Path) -> None:
    """Refuse a second folder of the same name with other code: transformers would mix the two without a word.

    4.57 keeps the code of local folders under the last part of their path, so that the second replaces every function
    the first model still calls. 5.x adds a digest of the file asked for; but the class of the configuration stands for
    that of the model, so that the second gets the first one's model unless its configuration's code differs too.
    """
    digest = hashlib.sha256()
    for name in CODE_FILES:
        digest.update((code / name).read_bytes() if (code / name).is_file() else b"")
    first, known = _code_in_use.setdefault(code.name, (code, digest.hexdigest()))
    if first != code and known != digest.hexdigest():
        raise ValueError(
            f"{code} has other model code than {first}, which this process has loaded, and both folders are named "
            f"{code.name!r}. Code is expected to be the same under one name, because transformers "
            f"{transformers.__version__} would mix the two. One is probably an older copy: rename a folder, or load "
            "them in two processes."
        )
