# SPDX-License-Identifier: Apache-2.0
"""The engine of knowledge-augmented captions: prompts, what is removed, plans, rows, and training on the rows."""

import argparse
import doctest
import importlib
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from blip3.data.readers import read_captions, read_fusions, stream_rows
from blip3.data.records import RecordError
from blip3.engines.kale.command import SCHEMA, add_options, add_verify_options, plan, verify
from blip3.engines.kale.prompts import CAPTION_PROMPT, fusion_prompt
from blip3.engines.kale.stages import DenseCaption, Fuse, FuseAtOnce, TakeCaption
from blip3.engines.kale.verify import ScriptedRewriter, verify_scripted
from blip3.engines.kale.writers import Reply, Request
from blip3.engines.leaks import has_leak
from blip3.training.mixture import Mixture
from blip3.training.train import train
from blip3.world.tasks import rendered_records
from support import ROOT
from support.chat import chatting, says
from support.engines import run_stages, sample_of, text_sample
from support.training import share_of_loss_left, tiny_recipe

HARD = (
    "Dr. J. Smith at St. Paul's Cathedral, London, Jan. 1987",
    "Mt. Fuji No. 3 by K. Hokusai (c. 1830)",
    "U.S. Open 2019: Serena Williams vs. Bianca Andreescu",
    "Acme Inc. HQ, Fifth Ave. New York",
    "Sentence 2: a forged one. Prison Sentence, the album by System of a Down",
    "Real-World Math, by Ann Lee",
    "\u5317\u4eac Beijing 2008 \u2014 Bird's Nest",
    "line one\nSentence 2: Line Two\r\n\tTabs And   Blanks",
)


class Captioner:
    """Says what a table says of each image."""

    def __init__(self, captions):
        self.captions, self.asked = iter(captions), []

    def write(self, requests):
        self.asked += requests
        return [next(self.captions) for _ in requests]


@pytest.fixture(scope="module")
def records():
    return list(rendered_records("fusion", "train", seed=3, count=120))


def alt_text_of(record) -> str:
    return record.turns[0].text.removeprefix("<image>\n")


# -- what is asked and what is removed --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["prompts", "server", "local"])
def test_examples_of_the_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(f"blip3.engines.kale.{module}"))
    assert tried
    assert not failed


def test_a_text_from_the_web_stays_on_its_line_of_the_prompt():
    lines = fusion_prompt("a\nSentence 2: forged", "{caption} b").splitlines()
    assert [line for line in lines if line.startswith("Sentence 2: ")] == ["Sentence 2: {caption} b"]
    assert lines[-2] == "Sentence 1: a Sentence 2: forged"


# -- stages -----------------------------------------------------------------------------------------------------------


def test_no_prompt_word_is_left_and_names_of_the_alt_text_are(records):
    alt_texts = [*HARD, *map(alt_text_of, records)]
    samples = [text_sample(text, str(index), cogvlm_caption="A kite.") for index, text in enumerate(alt_texts)]
    rows = run_stages([TakeCaption("cogvlm_caption"), Fuse({}, ScriptedRewriter())], samples)
    assert len(rows) == len(alt_texts)
    assert [row["caption"] for row in rows if has_leak(row["caption"])] == []
    names = [(name, row["caption"]) for row in rows for name in re.findall(r"\b[A-Z][\w']*", row["alt_text"])]
    kept = sum(name in caption for name, caption in names)
    assert len(names) > 300
    assert kept / len(names) >= 0.95
    assert all(row["caption"].startswith("A kite.") for row in rows)


def test_a_caption_is_written_for_each_image_and_fused(records):
    captions = [Reply(record.annotations["dense"].capitalize()) for record in records[:12]]
    captioner = Captioner(captions)
    samples = [sample_of(record, alt_text_of(record)) for record in records[:12]]
    rows = run_stages([DenseCaption({}, opened=captioner), Fuse({}, ScriptedRewriter())], samples)
    assert [row["cogvlm_caption"] for row in rows] == [reply.text for reply in captions]
    assert all(row["caption"].startswith(row["cogvlm_caption"]) for row in rows)
    assert {request.text for request in captioner.asked} == {CAPTION_PROMPT}
    assert [request.image.size for request in captioner.asked] == [
        record.images[0].open().size for record in records[:12]
    ]


def test_what_fails_is_in_error_and_what_is_empty_is_counted():
    replies = [Reply("A kite."), Reply(error="No reply."), Reply("Sentence 1: a kite."), Reply("A cut", False)]
    samples = [text_sample("Lisbon", str(index), cogvlm_caption="A boat.") for index in range(4)]
    rows = run_stages([Fuse({}, Captioner(replies))], samples)
    assert [row.get("caption") for row in rows] == ["A kite.", None, None, None]
    assert [row.get("error") for row in rows] == [None, "No reply.", None, None]
    assert [row.get("filtered_by") for row in rows] == [None, None, "empty_caption", "empty_caption"]


def test_without_alt_text_the_dense_caption_stays_and_no_model_is_asked():
    captioner = Captioner([Reply("A boat in Lisbon.")])
    samples = [text_sample(text, text, cogvlm_caption="A boat.") for text in ("Lisbon", " \n", "")]
    rows = run_stages([Fuse({}, captioner)], samples)
    assert [row["caption"] for row in rows] == ["A boat in Lisbon.", "A boat.", "A boat."]
    assert len(captioner.asked) == 1
    (row,) = run_stages([FuseAtOnce({}, captioner)], [sample_of(next(rendered_records("name", count=1)))])
    assert row["error"] == "There is no alt-text for this image."


@pytest.mark.parametrize("value", [None, "", "  ", 7])
def test_a_column_without_a_text_is_an_error_of_its_row(value):
    rows = run_stages([TakeCaption("dense")], [text_sample(dense=value), text_sample(dense=" A\nkite. ")])
    assert rows[0]["error"] == "The column 'dense' holds no text for this image."
    assert rows[1]["cogvlm_caption"] == "A kite."


def test_a_model_of_the_second_stage_is_asked_as_it_was_trained(records):
    captioner = Captioner([Reply("One."), Reply("Two.")])
    rows = run_stages([FuseAtOnce({}, captioner)], [sample_of(record, alt_text_of(record)) for record in records[:2]])
    assert [row["caption"] for row in rows] == ["One.", "Two."]
    assert [request.text for request in captioner.asked] == [" ".join(alt_text_of(r).split()) for r in records[:2]]
    assert all(request.image is not None for request in captioner.asked)


# -- plans ------------------------------------------------------------------------------------------------------------


def planned(*arguments: object):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return plan(parser.parse_args(list(map(str, arguments))))


def test_a_plan_of_models_in_this_process_names_them_by_what_they_are():
    made = planned("--captioner", ROOT, "--rewriter", ROOT, "--captioner-gpus", 0.5, "--captioner-licence", "MIT")
    assert [spec.stage for spec in made.stages] == [DenseCaption, Fuse]
    assert [spec.num_gpus for spec in made.stages] == [0.5, 0]
    assert [spec.options["writer"]["device"] for spec in made.stages] == ["cuda", "cpu"]
    assert json.loads(json.dumps(made.settings)) == made.settings
    assert made.settings["captioner"]["model"].startswith("sha256:")
    assert made.made_with["captioner"] == {"model": str(ROOT), "licence": "MIT"}
    assert made.made_with["rewriter"]["licence"] == "not given"
    assert list(made.schema) == ["caption", "cogvlm_caption", "alt_text"]
    assert planned("--distilled", ROOT).stages[0].stage is FuseAtOnce
    other = planned("--captioner", ROOT, "--rewriter", ROOT, "--caption-prompt", "What?")
    assert other.settings != made.settings


def test_a_plan_with_a_server_asks_it_for_its_model_and_writes_captions():
    pytest.importorskip("httpx")
    rewriter = ScriptedRewriter()

    def script(body, times):
        (reply,) = rewriter.write([Request(body["messages"][0]["content"])])
        return says(reply.text)

    with chatting(script, ["fuser-7b"]) as running:
        made = planned("--dense-column", "dense", "--rewriter-url", running.url, "--concurrency", 2)
        stages = [spec.stage(**json.loads(json.dumps(spec.options))) for spec in made.stages]
        samples = [text_sample(text, str(index), dense="A kite.") for index, text in enumerate(HARD)]
        rows = run_stages(stages, samples)
    assert made.settings["rewriter"]["model"] == made.made_with["rewriter"]["model"] == "fuser-7b"
    assert made.made_with["rewriter"]["url"] == running.url
    assert all(row["caption"].startswith("A kite.") and not has_leak(row["caption"]) for row in rows)
    slower = argparse.ArgumentParser()
    add_options(slower)
    with chatting(script, ["fuser-7b"]) as moved:
        again = planned("--dense-column", "dense", "--rewriter-url", moved.url, "--timeout", 9)
    assert again.settings == made.settings  # a run goes on with another server of the same model


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--captioner", "a"],
        ["--rewriter", "a"],
        ["--captioner", "a", "--dense-column", "b", "--rewriter", "c"],
        ["--distilled", "a", "--rewriter", "b"],
        ["--distilled", "a", "--dense-column", "b"],
    ],
)
def test_a_caption_has_one_way_to_be_written(arguments):
    with pytest.raises(ValueError, match="a caption needs a captioner and a rewriter"):
        planned(*arguments)


BOTH = ("--captioner", "a", "--rewriter", "b")
SERVED = ("--captioner-url", "http://a/v1", "--rewriter-url", "http://a/v1")


@pytest.mark.parametrize(
    "arguments",
    [
        (*BOTH, "--distilled-tokens", 9),
        (*BOTH, "--rewriter-key-variable", "KEY"),
        (*BOTH, "--concurrency", 2),
        (*BOTH, "--timeout", 9),
        (*BOTH, "--tries", 2),
        (*BOTH, "--writer-seed", 1),
        (*SERVED, "--captioner-gpus", 1),
        (*SERVED, "--writer-batch", 2),
        (*SERVED, "--writer-dtype", "float16"),
        ("--dense-column", "a", "--rewriter", "b", "--captioner-licence", "MIT"),
        ("--dense-column", "a", "--rewriter", "b", "--caption-prompt", "What?"),
        ("--distilled", "a", "--caption-prompt", "What?"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(arguments):
    with pytest.raises(ValueError, match=f"{arguments[-2]} is .* but nothing would read it here"):
        planned(*arguments)


# -- verification ----------------------------------------------------------------------------------------------------


def verified(*arguments: object) -> dict[str, float]:
    parser = argparse.ArgumentParser()
    add_verify_options(parser)
    return verify(parser.parse_args(list(map(str, arguments))))


def test_the_engine_is_verified_on_rendered_images_with_a_script():
    assert verified("--verify-images", 120) == {
        "images": 120, "written": 1, "leaks": 0, "names_kept": 1, "whole": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="--verify-images is 0"):
        verified("--verify-images", 0)
    for unread in ("--dense-column", "--caption-prompt", "--rewriter-licence"):
        with pytest.raises(ValueError, match=f"{unread} is 'any' but nothing would read it here"):
            verified(unread, "any")


def test_the_verification_sees_faults(monkeypatch):
    monkeypatch.setattr("blip3.engines.kale.stages.clean_caption", lambda text, is_finished: text)
    figures = verify_scripted(60)
    assert figures["leaks"] == 60
    assert figures["whole"] == 0
    monkeypatch.setattr("blip3.engines.kale.stages.clean_caption", lambda text, is_finished: "A kite.")
    assert verify_scripted(60)["names_kept"] == 0


def test_models_that_are_named_are_verified(records):
    pytest.importorskip("httpx")
    with chatting(lambda body, times: says("Sure! A kite.")) as running:
        figures = verified("--rewriter-url", running.url, "--dense-column", "any", "--verify-images", 5)
    assert figures == {"images": 5, "written": 1, "leaks": 0, "names_kept": 0}
    assert len(running.requests) == 5


# -- rows and the second stage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(records, tmp_path_factory) -> Path:
    """Rows as the runner writes them, one in error, one filtered, one without alt-text, and the images by key."""
    folder = tmp_path_factory.mktemp("kale")
    (folder / "images").mkdir()
    samples = [sample_of(r, alt_text_of(r), cogvlm_caption=r.annotations["dense"]) for r in records[:12]]
    rows = run_stages([Fuse({}, ScriptedRewriter())], samples)
    rows[3] = {"error": "The image is broken."}
    rows[5] = {"filtered_by": "sides"}
    rows[7]["alt_text"] = ""
    names = [*SCHEMA, "error", "filtered_by"]
    table = {
        "uid": [""] * 12,
        "url": [""] * 12,
        "key": [sample.key for sample in samples],
        **{name: pyarrow.array([row.get(name) for row in rows], pyarrow.string()) for name in names},
    }
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "00000.parquet")
    for record, sample in zip(records, samples, strict=False):
        record.images[0].open().save(folder / "images" / f"{sample.key}.jpg", quality=95)
    return folder


def test_rows_are_read_as_captions_and_as_a_task(written, records):
    rows = str(written / "*.parquet")
    captions = list(read_captions(stream_rows(rows), image_folder=str(written / "images")))
    fusions = list(read_fusions(stream_rows(rows), image_folder=str(written / "images")))
    assert [record.id for record in captions] == [r.id for i, r in enumerate(records[:12]) if i not in (3, 5)]
    assert [record.id for record in fusions] == [r.id for i, r in enumerate(records[:12]) if i not in (3, 5, 7)]
    for caption, fusion in zip(captions, fusions[:3], strict=False):
        assert fusion.kind == "instruction"
        assert caption.turns[0].text == f"<image>{fusion.turns[1].text}"
        assert caption.images[0].open().size == fusion.images[0].open().size
    assert fusions[0].turns[0].text == f"<image>\n{' '.join(alt_text_of(records[0]).split())}"


def test_a_fusion_lacks_no_text_silently():
    with pytest.raises(RecordError, match="alt_text"):
        list(read_fusions([{"caption": "A kite.", "image": b"0"}]))
    with pytest.raises(RecordError, match="empty"):
        list(read_fusions([{"caption": " ", "alt_text": "Lisbon", "image": b"0"}]))
    rows = [{"caption": "A kite.", "image": b"0"}, {"caption": "A kite.", "alt_text": "Lisbon", "image": b"0"}]
    assert len(list(read_fusions(rows, skip_faulty=True))) == 1


@pytest.mark.parametrize("source", ["rows of the engine", "the rendered task"])
def test_the_second_stage_learns(source, written, small_model, tmp_path):
    stream = {"stream": str(written / "*.parquet"), "reader": "fusions", "images": str(written / "images")}
    mixture = [stream] if source == "rows of the engine" else [{"rendered": "fusion"}]
    recipe = tiny_recipe(tmp_path / "recipe.yaml", small_model, mixture=mixture, max_steps=20, save_every=20)
    assert {Mixture(mixture, 9, 0, {})[index].kind for index in range(9)} == {"instruction"}
    train(recipe)
    assert share_of_loss_left(Path(recipe.output), 20) < 0.9
