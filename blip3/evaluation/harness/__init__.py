# SPDX-License-Identifier: Apache-2.0
"""Public benchmarks through other projects' harnesses: this repository owns adapters and tables, and no benchmark.

prompts.py        conversations with images at their places, as any processor takes them
models.py         a vision-language model of transformers that answers conversations
lmms_model.py     `lmms-eval --model blip3`: any vision-language model of transformers
write_tasks.py    the command that writes tasks for `lmms-eval --include_path`
few_shot.py       the few-shot protocol: demonstrations, prompts, answers; without a harness
few_shot_task.py  the same as tasks of lmms-eval
stemming.py       OK-VQA's answers as stems
row_images.py     images of rows, and the command that copies those that URLs name
neighbours.py     the command that finds similar demonstrations by a vision tower
vlguard.py        VLGuard's questions, and what counts of an answer; without a harness
vlguard_task.py   the same as tasks of lmms-eval
vlmevalkit.py     the command that runs VLMEvalKit in a process of its own
kit_process.py    what runs there
results.py        what harnesses wrote, as measurements: of which model, the newest, one of several seeds
lmms_results.py   a results file of lmms-eval
kit_results.py    a summary of VLMEvalKit
known.py          where each harness has a benchmark's number, and on which scale
measured.py       one number
naming.py         what a model is called in tables
judge_models.py    which numbers need a judge model
collect.py        the command that makes tables of them, beside published numbers
published.yaml    those numbers, each with its source

Nothing here imports a harness until it is asked to.
"""

from typing import Any


def lmms_manifests() -> Any:
    """Name the adapter to lmms-eval, which finds this function by the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("blip3", chat_class_path=f"{__name__}.lmms_model.InterleavedModel")
