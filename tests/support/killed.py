# SPDX-License-Identifier: Apache-2.0
"""Kill training or a conversion again and again; what they leave must be whole, and in the end as if undisturbed.

    python tests/support/killed.py train RECIPE OUTPUT --kills 20       damages the newest checkpoint in between, too
    python tests/support/killed.py convert SOURCE OUTPUT --kills 50     OUTPUT holds another conversion when it begins

The command is first run once undisturbed. Then it dies by SIGKILL: at a random moment, at a random one of its changes
of files, or at a change inside `final`. The last line printed is JSON: how often each happened.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blip3.conversion import cli as convert_weights
from blip3.training import train

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree")
ANY, FINAL = "", "final"


@dataclass(frozen=True)
class Command:
    """What is killed.

    Attributes:
        run: it, in a process of its own.
        watched: folder whose changes are counted.
        state: of a complete output, to compare.
        words: parts of paths; kills are aimed at changes of paths that hold one.
    """

    run: Callable[[], object]
    watched: Path
    state: Callable[[], object]
    words: tuple[str, ...] = (ANY,)


def watch(folder: Path, notice: Callable[[str], None]) -> None:
    """Be told of each path in a folder that this process is about to change."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            is_change = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            is_change = event in CHANGES
        path = str(arguments[0]) if is_change else ""
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # a name in an open folder, as `rmtree` gives it
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if str(folder) in path:
            notice(path)

    sys.addaudithook(hook)


def in_child(work: Callable[[], object], seconds: float = 0.0) -> bool:
    """Run something in a process of its own, killed after so many seconds if any; gives whether it was killed.

    Raises:
        RuntimeError: if it failed.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = work() or 0
        finally:
            os._exit(status if isinstance(status, int) else 1)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    if ended not in (0, signal.SIGKILL):
        raise RuntimeError(f"The command ended with {ended}; 0 or a kill was expected. See its own output above.")
    return ended == signal.SIGKILL


def measure(command: Command) -> tuple[dict[str, int], float]:
    """Run once undisturbed; gives how often a path with each of the words was changed, and the seconds."""
    with tempfile.NamedTemporaryFile() as file:

        def work() -> None:
            counts = dict.fromkeys(command.words, 0)

            def notice(path: str) -> None:
                for word in command.words:
                    counts[word] += word in path

            watch(command.watched, notice)
            command.run()
            Path(file.name).write_text(json.dumps(counts))

        start = time.monotonic()
        in_child(work)
        return json.loads(Path(file.name).read_text()), time.monotonic() - start


def kill_at_change(command: Command, word: str, number: int) -> bool:
    """Run until the so manieth change of a path that holds a word."""

    def work() -> object:
        left = [number]

        def notice(path: str) -> None:
            left[0] -= word in path
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        watch(command.watched, notice)
        return command.run()

    return in_child(work)


def kill_often(
    command: Command,
    kills: int,
    chance: random.Random,
    after_kill: Callable[[Counter], None],
    after_end: Callable[[], None],
) -> Counter:
    """Kill a command so many times; it starts anew, or goes on, after each.

    Args:
        command: that is killed.
        kills: how often.
        chance: moments.
        after_kill: looks at what is there, raises if it is not whole.
        after_end: when the command came to its end unharmed: looks at the output and makes room for the next.
    """
    changes, seconds = measure(command)
    counts: Counter = Counter()
    after_end()
    while counts["kills"] < kills:
        word = chance.choice([*command.words, None])
        if word is None:
            kind, was_killed = "at a moment", in_child(command.run, chance.uniform(0.02, seconds))
        else:
            kind = f"in {word}" if word else "at a change"
            was_killed = kill_at_change(command, word, chance.randint(1, max(1, changes[word])))
        if was_killed:
            counts["kills"] += 1
            counts[kind] += 1
            after_kill(counts)
        else:
            counts["ended between"] += 1
            after_end()
    return counts


def same_or_raise(found: object, expected: object) -> None:
    """Compare two states."""
    if found != expected:
        raise RuntimeError(f"The output is {found} but {expected} was expected, as undisturbed.")


def digests(folder: Path) -> dict[str, str]:
    """Give the sha256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def checkpoints_of(output: Path) -> list[Path]:
    """Give the checkpoints, the newest last."""
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def damage(output: Path, chance: random.Random) -> bool:
    """Cut, change or remove a file of the newest checkpoint, where there is an older one; gives whether it did."""
    folders = checkpoints_of(output)
    files = sorted(path for path in folders[-1].iterdir() if path.is_file()) if len(folders) > 1 else []
    if not files:
        return False
    path, how = chance.choice(files), chance.choice(["cut", "change", "remove"])
    data = path.read_bytes()
    place = chance.randrange(max(1, len(data)))
    if how == "remove" or not data:
        path.unlink()
    else:
        path.write_bytes(data[:place] + (b"" if how == "cut" else bytes([data[place] ^ 1]) + data[place + 1 :]))
    return True


def kill_training(recipe: Path, output: Path, kills: int, chance: random.Random) -> Counter:
    """Kill a run, also while it writes `final`, and damage its newest checkpoint in between."""

    def state() -> object:
        history = json.loads((checkpoints_of(output)[-1] / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        return losses, digests(output / "final")["model.safetensors"]

    def run() -> None:
        sys.argv[1:] = [str(recipe)]
        train.main()

    command = Command(run, output, state, (ANY, FINAL))
    expected: list[object] = []

    def after_kill(counts: Counter) -> None:
        if chance.random() < 0.4:
            counts["damaged checkpoints"] += damage(output, chance)

    def after_end() -> None:
        expected[:] = expected or [state()]
        same_or_raise(state(), expected[0])
        shutil.rmtree(output)

    counts = kill_often(command, kills, chance, after_kill, after_end)
    in_child(run)
    same_or_raise(state(), expected[0])
    return counts


def kill_conversions(source: Path, output: Path, kills: int, chance: random.Random) -> Counter:
    """Kill a conversion that replaces another: one of the two is there, whole, or for a moment none."""
    old = output.with_name("before")
    tower = ("--vision-config", str(source / "siglip_vision_config.json"))

    def convert(target: Path, *options: str) -> int:
        with open(os.devnull, "w") as nowhere:
            sys.stdout = sys.stderr = nowhere
            return convert_weights.main([str(source), str(target), *tower, *options])

    in_child(lambda: convert(old))
    states = {"old": digests(old)}

    def run() -> int:
        return convert(output, "--dtype", "bfloat16", "--max-shard-size", "100KB")

    command = Command(run, output.parent, lambda: digests(output))

    def restore() -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(old, output)

    def after_kill(counts: Counter) -> None:
        found = command.state()
        name = "new" if found == states["new"] else "old" if found == states["old"] else "none"
        if name == "none" and output.exists():
            raise RuntimeError(f"{output} holds {sorted(found)}, neither the old output nor the new one.")
        counts[f"{name} output left"] += 1
        restore()

    def after_end() -> None:
        states.setdefault("new", digests(output))
        same_or_raise(digests(output), states["new"])
        same_or_raise({path.name for path in output.parent.iterdir()}, {output.name, old.name})
        restore()

    restore()
    counts = kill_often(command, kills, chance, after_kill, after_end)
    in_child(run)
    after_end()
    return counts


def main() -> None:
    """Read the command line, kill, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "convert"))
    parser.add_argument("source", type=Path, help="recipe, or checkpoint in the release's layout")
    parser.add_argument("output", type=Path, help="folder")
    parser.add_argument("--kills", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    kill = kill_training if args.what == "train" else kill_conversions
    print(json.dumps(kill(args.source, args.output, args.kills, random.Random(args.seed))))


if __name__ == "__main__":
    main()
