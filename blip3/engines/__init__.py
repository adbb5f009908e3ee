# SPDX-License-Identifier: Apache-2.0
"""Data engines: shards of images in, parquet files in the published forms of BLIP3-OCR, -GROUNDING and -KALE out.

    shard --> samples --> stage --> stage --> ... --> one parquet file, complete or absent

An engine is a list of stages (`stages.EnginePlan`); `ocr`, `grounding` and `kale` each make one from the options of
their command.
"""
