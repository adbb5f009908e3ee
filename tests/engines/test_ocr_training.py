# SPDX-License-Identifier: Apache-2.0
"""Rows of the OCR engine as a source of a recipe: written to parquet, read back, trained on until the loss falls."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip3.engines.ocr.command import SCHEMA
from blip3.engines.ocr.readers import Line, Reading
from blip3.engines.ocr.rows import keep_lines, write_captions, write_metadata
from blip3.training import train
from blip3.training.mixture import Mixture
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_records
from support.training import WORLD, make_small_model, share_of_loss_left, tiny_recipe


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Six pages as files, and a parquet file of rows in the published order of columns; one row is in error."""
    folder = tmp_path_factory.mktemp("pages")
    rows = []
    for number, record in enumerate(rendered_records("ocr", "train", 0, 6, settings_from(WORLD))):
        image = record.images[0].open()
        image.save(folder / f"{number:05}.jpg", quality=95)
        (width, height), lines = image.size, []
        for string in record.annotations["pictures"][0]["strings"]:
            x1, y1, x2, y2 = (edge * side for edge, side in zip(string["box"], (width, height) * 2, strict=True))
            lines.append(Line(string["text"], ((x1, y1), (x2, y1), (x2, y2), (x1, y2)), 0.99))
        kept = keep_lines(Reading(tuple(lines)), (height, width), 0.0)
        values = {
            "captions": write_captions(kept.entries, "A page."),
            "metadata": write_metadata(kept.entries, kept.dropped),
        }
        rows.append({"uid": f"u{number}", "url": "", "key": f"{number:05}", **values, "error": None})
    rows.append({"uid": "bad", "url": "", "key": "bad", "error": "It has 0 bytes."})
    names = ("uid", "url", "key", *SCHEMA, "error", "filtered_by")
    schema = pa.schema([(name, pa.string()) for name in names])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "00000.parquet")
    return folder / "00000.parquet"


def test_a_recipe_trains_on_rows_of_the_engine(shard, tmp_path):
    options = {"image_folder": str(shard.parent), "with_caption": False}
    source = {"stream": str(shard), "reader": "ocr", "options": options}
    ids = {record.id for record in map(Mixture([source], 12, 0, WORLD).__getitem__, range(12))}
    assert ids == {f"u{number}" for number in range(6)}
    recipe = tiny_recipe(
        tmp_path / "run.yaml", make_small_model(tmp_path), mixture=[source], max_steps=20, save_every=20
    )
    train.train(recipe)
    assert share_of_loss_left(tmp_path / "run", 20) < 0.9
