# SPDX-License-Identifier: Apache-2.0
"""What was found out about data, once for all processes of this user: below `BLIP3_CACHE`, else `~/.cache/blip3`."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_folder(kind: str) -> Path:
    """Give the folder in which notes of a kind are kept."""
    return Path(os.environ.get("BLIP3_CACHE") or Path("~/.cache/blip3").expanduser()) / kind


def made_once(kind: str, identity: str, fill: Callable[[Path], None]) -> Path:
    """Give the folder of notes about something; of several processes one fills it, and the others wait for that.

    Args:
        kind: of the notes, a name.
        identity: of what they are about: where it changes, notes are made anew.
        fill: writes the notes into an empty folder.

    Returns:
        the folder, complete. Where the cache cannot be written, it is a temporary one.
    """
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    folder = cache_folder(kind) / digest
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{digest[:2]}.lock"))
        lock.acquire()
    except OSError:  # without room or rights every process makes its own
        return _filled(Path(tempfile.mkdtemp(prefix=f"blip3-{kind}-")), fill)
    try:
        if not folder.is_dir():
            _filled(Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{digest}-")), fill).replace(folder)
    finally:
        lock.release()
    return folder


def _filled(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a folder, or remove it."""
    try:
        fill(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
