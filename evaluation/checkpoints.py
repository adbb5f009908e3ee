# SPDX-License-Identifier: Apache-2.0
"""Folders that `from_pretrained` loads: where their code is, and what tells them apart."""

import hashlib
from pathlib import Path

_FINGERPRINTED = (".jinja", ".json", ".model", ".py", ".safetensors")


def check_folder(folder: str | Path, subfolder: str = "") -> Path:
    """Give the folder of a checkpoint's own files.

    Raises:
        FileNotFoundError: if it has no config.json.
    """
    path = Path(folder, subfolder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no config.json but a checkpoint is a folder with one. The path is probably misspelt or the "
            "training has not saved yet: name the folder that from_pretrained loads."
        )
    return path


def find_code(checkpoint: Path) -> tuple[Path, str]:
    """Split a checkpoint's path into the nearest folder with the model's code, itself or one above, and the rest.

    `from_pretrained` wants them so: the repository ships code once and checkpoints in subfolders.

    Returns:
        that folder and the subfolder in it; the path itself and nothing if there is no code.
    """
    whole = checkpoint.resolve()
    for folder in (whole, *whole.parents):
        if (folder / "modeling_blip3.py").is_file():
            return folder, "" if folder == whole else whole.relative_to(folder).as_posix()
    return checkpoint, ""


def fingerprint(folder: str | Path, subfolder: str = "") -> str:
    """Tell checkpoints apart by the names and the contents of their files.

    Raises:
        FileNotFoundError: if there is no checkpoint in the folder.
    """
    digest = hashlib.sha256()
    for path in sorted(check_folder(folder, subfolder).iterdir()):
        if path.is_file() and path.suffix in _FINGERPRINTED:
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:32]}"
