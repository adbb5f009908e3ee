# SPDX-License-Identifier: Apache-2.0
"""OUTPUT as a whole: it appears at once, replaces an earlier one, and keeps what the user put beside it.

Everything is written to a hidden folder beside OUTPUT, flushed to disk and renamed. Such folders carry a mark, and
only marked ones are ever removed. SHA256SUMS in it lists what this script wrote, so that a later run knows an earlier
output and tells our files from the user's:

    listed, unchanged     replaced, or removed if the new output has no such file
    listed, changed       the run refuses and names it
    not listed            stays; weights, or a file in the way of a new one, make the run refuse
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..checkpoints import GOLDEN_FILE
from ..files import read_lines, sha256_of, sync_folder, write_text
from ..refusals import list_names
from .configs import optional_json
from .tensors import progress_bar

MANIFEST = "SHA256SUMS"  # in the format of `sha256sum -c`
MARK = ".written-by-convert-weights"  # in a folder that is ours to remove
PARTIAL, OLD, REMOVED = ".partial", ".old", ".removed"
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
CACHE = "__pycache__"  # of importing handler.py; made again when needed


def is_our_output(folder: Path) -> bool:
    """Tell whether a folder may be replaced: written by this script, and no working tree.

    Raises:
        ValueError: if its config.json is not JSON.
    """
    config = optional_json(folder / "config.json")
    if config is None or config.get("model_type") not in ("blip3", "xgenmm") or not (folder / MANIFEST).is_file():
        return False
    return not (folder / ".git").exists() and not (folder / "convert_weights.py").exists()


def prepare_output(output: Path, sources: list[Path]) -> None:
    """Recover from a killed run, then refuse an OUTPUT that is not ours to replace.

    To be called, and followed by `replacing`, inside `files.only_writer(output)`.

    Raises:
        ValueError: if OUTPUT is something else, holds a source, or was changed since it was written.
    """
    _recover(output)
    for source in sources:
        if output.resolve() == source.resolve() or output.resolve() in source.resolve().parents:
            raise ValueError(
                f"OUTPUT {output} is, or holds, the source {source}, which would be replaced by the result. "
                "A path was probably given twice: choose another OUTPUT."
            )
    if not output.is_file() and not (output.is_dir() and any(output.iterdir())):
        return
    if output.is_file() or not is_our_output(output):
        raise ValueError(
            f"OUTPUT {output} exists and was not written by this script (no config.json with {MANIFEST}); only an "
            "empty folder or an earlier output is replaced. The path is probably wrong: choose another OUTPUT, or "
            "remove it yourself."
        )
    _refuse_changes(output)


def _refuse_changes(output: Path) -> None:
    listed = read_manifest(output)
    changed = _changed_files(output, listed)
    if changed:
        raise ValueError(
            f"{len(changed)} of the {len(listed)} files this script wrote to OUTPUT {output} differ from {MANIFEST}: "
            f"{list_names(changed)}. They were probably edited by hand or trained further, and would be lost: choose "
            "another OUTPUT, or move them away."
        )
    weights = [name for name in added_files(output, listed) if "/" not in name and name.endswith(WEIGHTS)]
    if weights:
        raise ValueError(
            f"OUTPUT {output} has {len(weights)} weights files that this script did not write: {list_names(weights)}. "
            "Beside new weights they would make a folder of two models: choose another OUTPUT, or move them away."
        )


def read_manifest(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file listed in a folder's SHA256SUMS, by its path within the folder."""
    lines = read_lines(folder / MANIFEST)
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines if "  " in line)}


def write_manifest(folder: Path) -> None:
    """List all files of a folder with their sha256 in its SHA256SUMS."""
    names = _files_in(folder)
    with progress_bar(sum((folder / name).stat().st_size for name in names), "sha256") as progress:
        lines = []
        for name in names:
            lines.append(f"{sha256_of(folder / name)}  {name}\n")
            progress.update((folder / name).stat().st_size)
    write_text(folder / MANIFEST, "".join(lines))


def are_weights_as_written(folder: Path) -> bool:
    """Tell whether the weights of a folder of ours are those that this script wrote into it."""
    listed = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    weights = {path.name for path in folder.glob("*.safetensors")} - {GOLDEN_FILE}
    return weights <= listed.keys() and not _changed_files(folder, {name: listed[name] for name in sorted(weights)})


def added_files(folder: Path, listed: dict[str, str]) -> list[str]:
    """Return the paths of files and links that SHA256SUMS does not list, without Python's caches."""
    return [name for name in _files_in(folder) if name not in listed and CACHE not in name.split("/")]


def _files_in(folder: Path) -> list[str]:
    """Return the paths of all files and links below a folder, SHA256SUMS left out, sorted."""
    found = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(name for name in found if name not in (MANIFEST, MARK))


def _changed_files(folder: Path, listed: dict[str, str]) -> list[str]:
    """Return the listed files whose content differs; a file that was removed counts as unchanged."""
    present = {name: digest for name, digest in listed.items() if (folder / name).is_file()}
    changed = []
    with progress_bar(sum((folder / name).stat().st_size for name in present), "sha256") as progress:
        for name, digest in present.items():
            changed += [name] * (sha256_of(folder / name) != digest)
            progress.update((folder / name).stat().st_size)
    return changed


def check_space(output: Path, num_bytes: int) -> None:
    """Refuse to start what cannot end for lack of disk.

    Raises:
        ValueError: if the disk of OUTPUT has less than `num_bytes` free.
    """
    parent = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ValueError(
            f"OUTPUT needs {num_bytes / 2**30:.1f} GiB and {parent} has {free / 2**30:.1f} GiB free. An earlier "
            "output is only removed after the new one is complete: free some space or choose another disk."
        )


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Give a hidden folder to write to, renamed to `output` at the end with the user's files of an earlier output.

    A kill leaves the old output, the new one, or none; the next run then puts the old one back.

    Raises:
        ValueError: if a file of the user's is in the way of a new one.
    """
    output = output.absolute()
    partial, old = _sibling(output, PARTIAL), _sibling(output, OLD)
    partial.mkdir(parents=True)
    (partial / MARK).write_text("Written by convert_weights.py; may be removed.\n", encoding="utf-8")
    try:
        yield partial
        write_manifest(partial)
        if is_our_output(output):
            _keep_added_files(output, partial)
        sync_folder(partial)
        if output.exists():
            (output / MARK).write_text("Replaced by convert_weights.py; may be removed.\n", encoding="utf-8")
            output.rename(old)
        partial.rename(output)
        (output / MARK).unlink()
        sync_folder(output.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove(partial)
        _put_back(old, output)
        raise
    _remove(old)


def _recover(output: Path) -> None:
    """Remove what killed runs left beside OUTPUT, and put back what one of them had moved away.

    Only folders with our mark are touched, and empty ones; a user may have one of such a name.
    """
    output = output.absolute()
    if not output.parent.is_dir():
        return
    (output / MARK).unlink(missing_ok=True)
    beside = [path for path in output.parent.iterdir() if path.name.startswith(f".{output.name}.")]
    marked = [path for path in sorted(beside) if (path / MARK).is_file()]
    for path in marked:
        if path.suffix == OLD:
            _put_back(path, output)
    for path in marked:
        if path.suffix in (PARTIAL, OLD, REMOVED):
            _remove(path)
    suffixes = "|".join(map(re.escape, (PARTIAL, REMOVED)))
    name = re.compile(rf"\.{re.escape(output.name)}\.\d+-[0-9a-f]{{8}}({suffixes})")
    for path in beside:
        if name.fullmatch(path.name) and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _put_back(old: Path, output: Path) -> None:
    """Make an output that was moved away the output again, unless a new one is there."""
    if old.exists() and not output.exists():
        old.rename(output)
        (output / MARK).unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a marked folder; renamed first, so that what a kill leaves of it is never put back.

    The mark goes last: without it the next run would take what is left for the user's.
    """
    if not folder.exists():
        return
    removed = folder.with_suffix(REMOVED)
    folder.rename(removed)
    for path in removed.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARK:
            with contextlib.suppress(OSError):
                path.unlink()
    shutil.rmtree(removed, ignore_errors=True)


def _sibling(output: Path, suffix: str) -> Path:
    """Name a hidden folder beside OUTPUT that no other run has."""
    return output.with_name(f".{output.name}.{os.getpid()}-{secrets.token_hex(4)}{suffix}")


def _keep_added_files(output: Path, partial: Path) -> None:
    """Put the user's files into the new folder too, as hard links where the file system has them."""
    added = added_files(output, read_manifest(output))
    in_the_way = [name for name in added if (partial / name).exists()]
    if in_the_way:
        raise ValueError(
            f"OUTPUT {output} has {len(in_the_way)} files that this script did not write, in the way of new ones: "
            f"{list_names(in_the_way)}. They were probably added by hand: choose another OUTPUT, or move them away."
        )
    for name in added:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(output / name, partial / name, follow_symlinks=False)
        except OSError:
            shutil.copy2(output / name, partial / name, follow_symlinks=False)
    if added:
        print(f"kept {len(added)} files that this script did not write: {list_names(added)}")
