# SPDX-License-Identifier: Apache-2.0
"""One run at a time in an output, and the checkpoint that it goes on from: the newest whose every file is whole.

    OUTPUT/checkpoint-N/manifest.json   written last: size and SHA-256 of every other file
    with resuming(recipe) as checkpoint: trainer.train(resume_from_checkpoint=checkpoint)

A checkpoint without a manifest was being written when its run ended. One whose files differ from its manifest was
damaged later. Either is passed over, with a line in the log, and written again when the resumed run gets there.
Runs of versions before manifests have none at all: there a checkpoint is whole if each of its files can be read.
"""

import contextlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from transformers import set_seed

from ..files import only_writer_in, remove_unfinished, sha256_of, sync_folder, write_json
from .inputs import check_inputs, inputs_of, note_inputs, noted_inputs
from .recipe import RecipeError, RunRecipe, TowerRecipe, load_recipe, refusing, save_recipe

SAVED_RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
_MAY_CHANGE = ("log_every", "save_every", "keep_checkpoints", "num_workers", "notes")

Value = TypeVar("Value")
logger = logging.getLogger(__name__)


def num_processes() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes what all of them share."""
    return os.environ.get("RANK", "0") == "0"


def decided_by_main(decide: Callable[[], Value]) -> Value:
    """Let the main process decide for all, which have started their process group; a refusal ends all of them.

    Raises:
        RecipeError: if the main process refused.
    """
    if num_processes() == 1:
        with refusing(ValueError):
            return decide()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = decide()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise RecipeError(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def resuming(recipe: RunRecipe) -> Iterator[str | None]:
    """Be the only run that writes `recipe.output`; save the resolved recipe and seed everything.

    Yields:
        the newest whole checkpoint in the output, or None.

    Raises:
        RecipeError: if another process is training into the folder, or it holds a run of another recipe.
    """
    with contextlib.ExitStack() as stack:

        def decide() -> str | None:
            stack.enter_context(only_writer_in(recipe.output))
            return resume_or_refuse(recipe)

        checkpoint = decided_by_main(decide)
        set_seed(recipe.seed)
        yield checkpoint


def resume_or_refuse(recipe: RunRecipe) -> str | None:
    """Find the checkpoint to resume from, and save the resolved recipe; for the main process alone.

    Returns:
        the newest whole checkpoint in `recipe.output`, or None.

    Raises:
        ValueError: if the folder holds a run of another recipe, or one of other weights under its adapters or other
            data.
    """
    output = Path(recipe.output)
    saved = output / SAVED_RECIPE
    checkpoint, inputs = find_checkpoint(output), inputs_of(recipe)
    if saved.is_file() and checkpoint:
        before = load_recipe(saved, type(recipe))
        others = processes_of(Path(checkpoint))
        may_change = _MAY_CHANGE if others == num_processes() else (*_MAY_CHANGE, "accumulation")
        changed = [
            name
            for name in vars(recipe)
            if name not in may_change and _as_json(getattr(before, name)) != _as_json(getattr(recipe, name))
        ]
        if changed:
            raise ValueError(
                f"{output} holds a run whose {changed[0]} was {getattr(before, changed[0])!r}, and now it is "
                f"{getattr(recipe, changed[0])!r}; resumed, it would be neither of the two. The recipe, or a file "
                "that it names, was probably edited: give it another output, or remove the folder."
            )
        _check_processes(before, recipe, others)
        noted = noted_inputs(output)
        if noted is None:
            _check_order(before, others)
        else:
            check_inputs(output, noted, inputs)
    save_recipe(recipe, saved)
    note_inputs(output, inputs)
    remove_unfinished(output)
    return checkpoint


def processes_of(checkpoint: Path) -> int:
    """Give how many processes wrote a checkpoint; those of now if it does not say, as earlier versions' do not."""
    try:
        values = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return num_processes()
    return int(values.get("processes", num_processes()))


def _check_processes(before: RunRecipe, recipe: RunRecipe, others: int) -> None:
    """Refuse another number of processes where samples would fall into other steps, or shards do not fit."""
    processes = num_processes()
    if processes == others:
        return
    if before.accumulation * others != recipe.accumulation * processes:
        raise ValueError(
            f"{recipe.output} holds a run of {others} processes with accumulation {before.accumulation}, and now "
            f"there are {processes} with {recipe.accumulation}; a step would be made of other samples. The run was "
            "probably moved to another number of devices: choose accumulation so that processes times accumulation "
            f"stay {before.accumulation * others}, or start {others} processes."
        )
    sharding = "deepspeed" if getattr(recipe, "deepspeed", "") else "fsdp" if getattr(recipe, "fsdp", False) else ""
    if sharding == "deepspeed" or (sharding and 1 in (others, processes)):
        raise ValueError(
            f"{recipe.output} holds a run of {others} processes with {sharding}, and now there are {processes}, for "
            f"which its shards were not cut. The run was probably moved to another number of devices: start {others} "
            "processes. With fsdp any numbers above one fit each other, and without either any do."
        )


def _check_order(before: RunRecipe, others: int) -> None:
    """Refuse a run of a version that took samples in another order, and did not note its inputs either."""
    is_sorted = getattr(before, "group_by_length", False) and before.accumulation > 1
    if not is_sorted and not (isinstance(before, TowerRecipe) and others > 1):
        return
    found = f"group_by_length and accumulation {before.accumulation}" if is_sorted else f"{others} processes"
    raise ValueError(
        f"{before.output} holds a run with {found} of a version that took its samples in another order than this one; "
        "resumed, it would see some twice and others never. The package was probably updated since: finish the run "
        "with the version that began it, or give the recipe another output."
    )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def find_checkpoint(output: Path) -> str | None:
    """Find the newest whole checkpoint, and name the newer ones that are not whole in the log."""
    passed_over = 0
    folders = checkpoints_in(output)
    examine = what_is_wrong if any((each / MANIFEST).exists() for each in folders) else what_cannot_be_read
    for folder in reversed(folders):
        reason = examine(folder)
        if not reason:
            if passed_over:
                logger.warning("The run goes on from %s, the newest whole checkpoint.", folder)
            return str(folder)
        passed_over += 1
        logger.warning("Passed over: %s: %s.", folder, reason)
    if passed_over:
        logger.warning("None of %d checkpoints in %s is whole: the run begins anew.", passed_over, output)
    return None


def checkpoints_in(output: Path) -> list[Path]:
    """List the folders of checkpoints, whole or not, oldest step first."""
    folders = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def what_is_wrong(folder: Path) -> str:
    """Compare a checkpoint with its manifest; gives what is wrong, or nothing."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (each["bytes"], each["sha256"]) for name, each in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is not there"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes but was written with {size}"
        if sha256_of(path) != digest:
            return f"{name} has other contents than were written"
    return "" if expected else f"its {MANIFEST} names no file"


def what_cannot_be_read(folder: Path) -> str:
    """Read every file of a checkpoint that was written before manifests; gives what is wrong, or nothing.

    `Trainer` writes trainer_state.json last. PyTorch's files carry checksums of their contents, safetensors a length.
    """
    if not (folder / "trainer_state.json").is_file():
        return f"it has neither a {MANIFEST} nor a trainer_state.json, so it was never finished"
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        try:
            is_whole = _read_whole(path)
        except (OSError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError):
            is_whole = False
        if not is_whole:
            return f"{path.relative_to(folder).as_posix()} cannot be read"
    return ""


def _read_whole(path: Path) -> bool:
    if path.suffix == ".json":
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            return bool(file.keys())
    if path.suffix in (".pt", ".pth", ".bin", ".distcp"):
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    return True


def write_manifest(folder: Path) -> None:
    """Write down what a checkpoint consists of, once all of it is there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    values = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }
    write_json(folder / MANIFEST, {"processes": num_processes(), "files": values})


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its manifest first: what a kill leaves of it is then no checkpoint."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)


def keep_newest(output: Path, newest: int, count: int) -> None:
    """Remove what is older than the newest `count` finished checkpoints.

    Args:
        output: of the run.
        newest: step that was just written; later ones are of an earlier try and stay until they are overwritten.
        count: to keep.
    """
    folders = [path for path in checkpoints_in(output) if int(path.name.removeprefix("checkpoint-")) <= newest]
    finished = [path for path in folders if (path / MANIFEST).is_file()]
    for folder in folders:
        if folder not in finished[-count:]:
            remove_checkpoint(folder)


@contextlib.contextmanager
def whole_folder(output: Path, wait: Callable[[], None]) -> Iterator[Path]:
    """Give a temporary folder to write to, the same in every process, which becomes `output` at the end.

    Args:
        output: replaced if it is there.
        wait: for the other processes.
    """
    unfinished = output.with_name(f".{output.name}.partial")
    if is_main_process():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    wait()
    yield unfinished
    wait()
    if is_main_process():
        if output.exists():
            shutil.rmtree(output)
        unfinished.replace(output)
        sync_folder(output.parent)
    wait()
