# SPDX-License-Identifier: Apache-2.0
"""What an engine is made of: samples, stages that add values to them, and the plan that names the stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from .packages import Package

Values = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One image of a shard, and what is known of it."""

    key: str
    """Unique in its shard: the key of a tar, the id of a parquet row, the path inside a folder."""
    image: bytes = field(repr=False)
    """The encoded file, as it lies in the shard."""
    url: str = ""
    uid: str = ""
    caption: str = ""
    """The raw alt-text."""
    shard: str = ""
    """Its shard's path inside the input: with `key` it names the image among all."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """All other columns of the shard's row, and what earlier stages added."""


class Stage(Protocol):
    """One step of an engine, with a model of its own; made once for each worker, in its process.

    A stage never sees a sample that is in error or was filtered out by a stage before it. A class may have two more
    attributes, for `StageSpec`: a static method `check`, called with the options before anything is started, which
    raises what a user has to correct; and `package`, a `packages.Package` that it needs.
    """

    needs_images: bool
    """Whether the samples' images are to be opened for it."""

    def __call__(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[Values]:
        """Work on some samples of one shard.

        Args:
            samples: at least one.
            images: theirs, upright and RGB; empty unless `needs_images`.

        Returns:
            What to add to each sample's values, in order. {"error": "One sentence."} is a sample that failed,
            {"filtered_by": "name"} one that a filter dropped. An exception is a fault of the whole run.
        """
        ...


@dataclass(frozen=True)
class StageSpec:
    """How a worker makes a stage."""

    stage: type[Stage]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class, JSON values."""
    num_cpus: float = 1
    num_gpus: float = 0
    """Of one worker; a fraction shares a card."""
    workers: int = 0
    """Processes of its own that all shards share. 0 runs the stage in the process of each shard, if it asks for one
    CPU and no GPU; else it gets one process."""

    @property
    def package(self) -> Package | None:
        """What the stage needs to be installed."""
        return getattr(self.stage, "package", None)

    def check(self) -> None:
        """Say what is wrong with the options before a worker is started; raises what the stage's `check` does."""
        if self.package is not None:
            self.package.check()
        check = getattr(self.stage, "check", None)
        if check is not None:
            check(**self.options)

    @property
    def is_pooled(self) -> bool:
        """Whether it has processes of its own."""
        return bool(self.workers or self.num_gpus or self.num_cpus != 1)


@dataclass(frozen=True)
class EnginePlan:
    """An engine as its command's options describe it."""

    name: str
    stages: tuple[StageSpec, ...]
    schema: Mapping[str, str]
    """Column -> type as `pyarrow.type_for_alias` names it, after uid, url and key; each is a value of a stage, never
    one of the shard, and null where no stage gave it. Every row has `error` and `filtered_by` too, null where all is
    well."""
    settings: Mapping[str, Any]
    """What the rows depend on, JSON values: a folder with rows of other settings is refused."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """Models, versions and licences, for the reader of the manifest."""
