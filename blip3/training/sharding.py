# SPDX-License-Identifier: Apache-2.0
"""How processes share a model that they train: FSDP2 of PyTorch, or ZeRO of DeepSpeed (arXiv:1910.02054).

    fsdp: true          weights, gradients and optimiser in shards, gathered a layer at a time
    deepspeed: zero3    the same by DeepSpeed
    deepspeed: zero2    gradients and optimiser in shards, weights whole in every process
    deepspeed: my.json  DeepSpeed's own configuration; what the recipe says may stand there as "auto"
    neither             DDP: every process holds everything

Shards are made on CPUs too, by gloo, so a recipe can be tried before there is a cluster.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..refusals import install, list_names

ZERO = ("zero2", "zero3")
_RECIPE_SAYS = {
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "train_batch_size": "batch_size, accumulation and the number of processes",
    "gradient_clipping": "max_grad_norm",
}


def read_deepspeed(name: str) -> dict[str, Any]:
    """Read the configuration that a recipe names.

    Args:
        name: `zero2`, `zero3`, or a JSON file; a relative one starts at the current folder.

    Raises:
        ValueError: if it is no configuration of ZeRO, or sets what the recipe sets.
    """
    path = Path(__file__).with_name(f"{name}.json") if name in ZERO else Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except FileNotFoundError:
        raise ValueError(
            f"The recipe has deepspeed {name!r} but it must be one of {', '.join(ZERO)} or a JSON file, and there is "
            "no such file. A relative path starts at the current folder: write zero3, or the file's path."
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"The recipe has deepspeed {name!r} but that is no JSON of DeepSpeed with zero_optimization.stage "
            f"({type(error).__name__}: {error}). It is probably another file, or unfinished: start from a copy of "
            f"{Path(__file__).with_name('zero3.json')}."
        ) from error
    if stage not in (1, 2, 3):
        raise ValueError(
            f"The recipe has deepspeed {name!r} with zero_optimization.stage {stage!r} but it must be 1, 2 or 3. "
            "Stage 0 shards nothing: leave deepspeed out, or write 3."
        )
    own = [key for key in ("optimizer", "scheduler") if key in config]
    own += [key for key in _RECIPE_SAYS if config.get(key, "auto") != "auto"]
    if own:
        raise ValueError(
            f"The recipe has deepspeed {name!r}, which sets {own[0]} to {config[own[0]]!r}, but the recipe itself "
            f"says {_RECIPE_SAYS.get(own[0], 'optimizer and schedule')}. It was probably copied from another project: "
            "remove the key."
        )
    return config | {key: "auto" for key in _RECIPE_SAYS}


def stage_of(deepspeed: str) -> int:
    """Give the stage of ZeRO that a recipe's `deepspeed` names: 1, 2 or 3."""
    return int(read_deepspeed(deepspeed)["zero_optimization"]["stage"])


def check_sharding(fsdp: bool, deepspeed: str, others: Sequence[str]) -> None:
    """Refuse ways of sharding that contradict each other, or what else a recipe asks for.

    Args:
        fsdp: of the recipe.
        deepspeed: of the recipe; empty for none.
        others: settings that need whole weights in each process, as `optimizer soap`.

    Raises:
        ValueError: naming the two.
    """
    if fsdp and deepspeed:
        raise ValueError(
            f"The recipe has fsdp true and deepspeed {deepspeed!r}, but only one of them can shard a model. The "
            "second was probably added to a recipe that had the first: remove one."
        )
    if deepspeed:
        read_deepspeed(deepspeed)
    if (fsdp or deepspeed) and others:
        found = "fsdp true" if fsdp else f"deepspeed {deepspeed!r}"
        raise ValueError(
            f"The recipe has {found} and {others[0]}, but that needs whole matrices, and they are sharded. It was "
            "probably copied from a recipe for one process: leave one of the two out."
        )


def sharding_arguments(fsdp: bool, deepspeed: str) -> dict[str, Any]:
    """Translate a recipe's sharding for `TrainingArguments`.

    Raises:
        ImportError: for DeepSpeed where it is not installed.
        ValueError: if the launcher was asked for another sharding than the recipe, or DeepSpeed has no launcher.
    """
    _check_launcher(fsdp, deepspeed)
    if fsdp:
        # transformers 4.57 passes neither on to accelerate
        os.environ |= {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        return {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    if not deepspeed:
        return {}
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(
            f"The recipe has deepspeed {deepspeed!r}, which needs the package deepspeed, and it is not installed. The "
            f"extra was probably left out: run {install('deepspeed')}, or write fsdp: true, which needs none."
        )
    arguments: dict[str, Any] = {"deepspeed": read_deepspeed(deepspeed)}
    if not torch.accelerator.is_available():
        arguments |= _deepspeed_on_cpus()
    return arguments


def _check_launcher(fsdp: bool, deepspeed: str) -> None:
    wanted = {"ACCELERATE_USE_FSDP": fsdp, "ACCELERATE_USE_DEEPSPEED": bool(deepspeed)}
    asked = [name for name in wanted if os.environ.get(name, "false").lower() == "true" and not wanted[name]]
    if asked:
        raise ValueError(
            f"The launcher sets {list_names(asked)} but the recipe has fsdp {fsdp} and deepspeed {deepspeed!r}, and "
            "the recipe says how to shard. The options probably stand in accelerate's configuration file: launch with "
            "`accelerate launch --multi_gpu` or torchrun, and write fsdp: true or deepspeed: zero3 into the recipe."
        )
    if deepspeed and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"The recipe has deepspeed {deepspeed!r} but this process has no LOCAL_RANK, by which DeepSpeed finds the "
            "others. It was probably started without a launcher: run `torchrun --nproc_per_node N -m "
            "blip3.training.train RECIPE`, N being 1 for one process."
        )


def _deepspeed_on_cpus() -> dict[str, Any]:
    """Start the process group: of DeepSpeed on CPUs accelerate counts one process, unless a backend is named.

    DeepSpeed would compile a shared-memory reduction first, for minutes, and a killed run leaves a lock on it at which
    every later one waits for ever. Without it gloo reduces.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    from accelerate import PartialState

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"accelerator_config": {"use_configured_state": True}, "ddp_backend": None, "use_cpu": False}


def shard_on_cpus() -> None:
    """Let FSDP2 shard on CPUs, where accelerate would train as DDP without a word; other devices it always shards on.

    For `PartialState` has been set up. What accelerate does for an XPU it does on a CPU's tensors as well.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state: Any = PartialState()
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_XPU
