# SPDX-License-Identifier: Apache-2.0
"""Real data of the recipe's forms -> records: LLaVA JSON and mixtures, parquet and webdataset shards.

llava         read_mixture("mix.yaml"), read_llava_json          {file: num_samples} of LLaVA JSON
captions      read_captions(...)                                 KALE, Datacomp, CC, SBU, VG
              read_fusions(...)                                  KALE as a task: image and alt-text -> caption
              read_ocr(stream_rows("ocr/*.parquet"))             BLIP3-OCR
              read_grounding(...)                                BLIP3-GROUNDING
interleaved   read_interleaved(...)                              OBELICS, MINT-1T, MMC4
preference    read_preferences(...)                              VLFeedback
safety        read_safety(...)                                   VLGuard
benchmarks    read_pope, read_hallusionbench, read_vlguard,      test files that post-training is scored on
              read_coco
rows          read_parquet("rendered/*.parquet"), read_rows      what world.build writes
              stream_rows(...), read_json_rows("train.json")     rows of shards or of JSON, for the readers above
              iterate_json_lines("vlfeedback_80k.jsonl")         rows of JSON lines that are too many to hold

Readers are generators: nothing is held but one row (a LLaVA list, which is one JSON value, is held whole). Every
message names the file or row and the field at fault; `skip_faulty=True` logs and counts faulty rows instead.
"""

from .benchmarks import read_coco, read_hallusionbench, read_pope, read_vlguard
from .captions import read_captions, read_fusions, read_grounding, read_ocr
from .interleaved import read_interleaved
from .llava import read_llava_json, read_mixture
from .preference import read_preferences
from .rows import iterate_json_lines, read_json_rows, read_parquet, read_rows, stream_rows
from .safety import read_safety

__all__ = [
    "iterate_json_lines",
    "read_captions",
    "read_coco",
    "read_fusions",
    "read_grounding",
    "read_hallusionbench",
    "read_interleaved",
    "read_json_rows",
    "read_llava_json",
    "read_mixture",
    "read_ocr",
    "read_parquet",
    "read_pope",
    "read_preferences",
    "read_rows",
    "read_safety",
    "read_vlguard",
    "stream_rows",
]
