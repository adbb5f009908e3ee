# SPDX-License-Identifier: Apache-2.0
"""Processes that several workers share: a stage that needs a GPU, or more memory than each worker can have.

    ray_run.run(plan, output, Worker, workers=8, pools=[PoolSpec(Detector, "Detector", ("folder",), num_gpus=1)])

    class Worker:                                               gets the pools as its last argument
        def __init__(self, pools): ...
        def __call__(self, shard):
            for page, boxes in self.pools[0].stream(pages):     in order, a few batches in flight

A pool is called with a list and returns a list as long. Its processes are restarted as often as they die. A batch that
kills one goes again one item at a time, and an item that does so each time is named by `DeadlyItem` in its place.
"""

import collections
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .faults import Fault, caught

IN_FLIGHT = 2  # batches of one worker at a pool: one is worked on, the next has arrived
MOST_DEATHS = 3
SECONDS_TO_START = 1800  # of a process that loads a large model


@dataclass(frozen=True)
class PoolSpec:
    """What a pool runs, and on how much."""

    work: type
    """A class whose instances turn a list into a list as long."""
    name: str = "a stage"
    """For messages."""
    arguments: tuple = ()
    workers: int = 1
    num_cpus: float = 1
    num_gpus: float = 0


@dataclass(frozen=True)
class DeadlyItem:
    """Stands for the result of an item that ended the process working on it."""

    message: str


class Pool:
    """A pool as a worker sees it.

    Args:
        name: for messages.
        actors: of Ray.
    """

    def __init__(self, name: str, actors: list[Any]):
        self.name, self.actors = name, actors

    def stream(self, batches: Iterable[tuple[Any, list]]) -> Iterator[tuple[Any, list]]:
        """Send batches, (anything, items) each, and yield (the same, results) in their order."""
        waiting: collections.deque[tuple[Any, list, Any, Any]] = collections.deque()
        turn = random.randrange(len(self.actors))
        for about, items in batches:
            actor = self.actors[turn % len(self.actors)]
            turn += 1
            waiting.append((about, items, actor, actor.work.remote(items) if items else None))
            if len(waiting) > IN_FLIGHT * len(self.actors):
                yield self._next(waiting)
        while waiting:
            yield self._next(waiting)

    def _next(self, waiting: collections.deque) -> tuple[Any, list]:
        about, items, actor, future = waiting.popleft()
        if future is None:
            return about, []
        results = _get(future)
        if results is None:  # it killed the process, or was waiting for one that another killed
            results = [result for item in items for result in self._alone(actor, item)]
        return about, results

    def _alone(self, actor: Any, item: Any) -> list:
        for _ in range(MOST_DEATHS):
            _wait_for(actor)
            results = _get(actor.work.remote([item]))
            if results is not None:
                return results
        return [DeadlyItem(f"The image ended the process of {self.name} that opened it, {MOST_DEATHS} times.")]


def _get(future: Any) -> list | None:
    """Wait for results; None if the process died.

    Raises:
        RuntimeError: if the work raised something.
    """
    import ray

    try:
        results = ray.get(future)
    except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
        return None
    if isinstance(results, Fault):
        raise results.error()
    return results


def _wait_for(actor: Any) -> None:
    """Wait until a process that died is there again.

    Raises:
        RuntimeError: if it cannot be started.
    """
    deadline = time.monotonic() + SECONDS_TO_START
    while _get(actor.work.remote([])) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"A process of a pool did not come back within {SECONDS_TO_START} s, but it is needed. It probably "
                "has too little memory: give it less to do, or another machine, and run the same command again."
            )
        time.sleep(1)


class _PoolWorker:
    """A Ray actor, which raises nothing (`faults`)."""

    def __init__(self, work: type, arguments: tuple):
        self.instance: Any = caught(lambda: work(*arguments))

    def work(self, items: list) -> list | Fault:
        if isinstance(self.instance, Fault):
            return self.instance
        return caught(lambda: self.instance(items)) if items else []


def start_pools(specs: Iterable[PoolSpec]) -> list[Pool]:
    """Start the processes of pools on a Ray that runs, and wait until each has loaded what it needs.

    They end with this process.

    Raises:
        RuntimeError: if there are too few GPUs on this machine, or a process cannot be made: then what it raised.
    """
    import ray

    pools = []
    for spec in specs:
        _check_gpus(spec, float(ray.cluster_resources().get("GPU", 0)))
        actor = ray.remote(_PoolWorker).options(
            num_cpus=spec.num_cpus, num_gpus=spec.num_gpus, max_restarts=-1, max_task_retries=0
        )
        actors = [actor.remote(spec.work, spec.arguments) for _ in range(spec.workers)]
        if None in [_get(started) for started in [actor.work.remote([]) for actor in actors]]:
            raise RuntimeError(
                f"A process of {spec.name} ended while it was made, but {spec.workers} are needed. There is probably "
                "too little memory for its model: give it fewer processes, or another machine."
            )
        pools.append(Pool(spec.name, actors))
    return pools


def _check_gpus(spec: PoolSpec, num_gpus: float) -> None:
    """Refuse what would wait for ever; a cluster may still grow."""
    wanted = spec.workers * spec.num_gpus
    if wanted > num_gpus and not os.environ.get("RAY_ADDRESS"):
        raise RuntimeError(
            f"{spec.name} asks for {wanted:g} GPUs, but Ray finds {num_gpus:g} on this machine. It was probably meant "
            "for another: run it on the CPU, or give each of its processes a fraction of a GPU."
        )
