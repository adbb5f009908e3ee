# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, suite by suite, at sizes whose times mean nothing; its arithmetic and its report are right."""

import doctest
import importlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blip3.benchmarks import (
    batching,
    busy,
    candidates,
    clock,
    cold_start,
    cold_start_child,
    generation,
    loader,
    machine,
    memory,
    memory_child,
    peers,
    products,
    report,
    run,
    scaling,
    scaling_report,
    targets,
    tokens,
)
from blip3.benchmarks.candidates import BARE, IDEFICS, LLAVA, OURS, QUARTER, QUICK, TRUE
from blip3.benchmarks.clock import Comparison, Effort
from support import ROOT

RUN_CHILD = memory.run_child
START_AND_ANSWER = cold_start.start_and_answer
DOCUMENT = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def one_child_only():
    """Measure memory and cold starts in this process, except once each: another takes seconds to import torch."""
    patch, started = pytest.MonkeyPatch(), []

    def run_here(bench, task, **arguments):
        started.append(task)
        if len(started) == 1:
            return RUN_CHILD(bench, task, **arguments)
        request = {"task": task, "sizes": bench.sizes.name, "device": bench.device, "threads": bench.threads}
        return memory_child.run_task(request | arguments)

    def answer_here(folder, threads):
        if folder == ROOT and str(ROOT) not in started:
            started.append(str(ROOT))
            return START_AND_ANSWER(folder, threads)
        return cold_start_child.answer_cold(str(folder), time.time(), threads)

    patch.setattr(memory, "run_child", run_here)
    patch.setattr(cold_start, "start_and_answer", answer_here)
    yield started
    patch.undo()


@pytest.fixture(scope="module")
def results(tmp_path_factory, one_child_only):
    """A folder with the results of every suite of a quick run."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--quick", "--threads", "1", "--rounds", "1", "--seconds", "0.5", "--output", str(folder)]
    assert run.main([*arguments, *(f"--suite={suite}" for suite in run.SUITES)]) == 0
    return folder


def rows_of(folder, suite):
    return {row["name"]: row for row in json.loads((folder / f"cpu_{suite}.json").read_text())["comparisons"]}


def test_every_optimisation_is_measured_on_and_off(results):
    rows = rows_of(results, "switches")
    assert all(list(row["values"]) == ["on", "off"] for row in rows.values())
    counts = {name.split(",")[0]: (row["facts"]["on"], row["facts"]["off"]) for name, row in rows.items()}
    on, off = counts["growing cache"]
    assert on["aten::cat"] < off["aten::cat"]
    for name in ("prefill by length", "window in blocks", "sliding window"):
        on, off = counts[name]
        assert on["language model"] > off["language model"], name
    on, off = counts["bytes"]
    assert 4 * on["bytes"] == off["bytes"]
    assert len(counts) == 9


def test_every_suite_leaves_results_with_machine_and_versions(results):
    for suite in run.SUITES:
        result = json.loads((results / f"cpu_{suite}.json").read_text())
        assert result["part"] == suite
        assert result["machine"]["threads"] == 1
        assert {"torch", "transformers", "Pillow"} <= result["machine"]["packages"].keys()
        assert result["rates"]["float32_flops_per_second"] > 0
        assert result["benchmark"]["sizes"]["name"] == "quick"
        measured = [row for row in result["comparisons"] if row["values"]]
        assert measured, suite
        for row in measured:
            is_slope = "lines" in row["facts"]  # of tiny models, it is noise
            assert is_slope or all(value >= 0 for values in row["values"].values() for value in values), row["name"]
            assert len({len(values) for values in row["values"].values()}) == 1, row["name"]
        assert str(ROOT) not in json.dumps(result)


def test_the_report_says_how_steady_the_machine_was(results, tmp_path):
    """The rates are measured anew before each suite, and a report of a machine that slowed down shows by how much."""
    rates = [json.loads((results / f"cpu_{suite}.json").read_text())["rates"] for suite in run.SUITES]
    assert len({tuple(rate.values()) for rate in rates}) > 1
    for suite, rate in (("tokens", 3e11), ("overhead", 4.2e11), ("memory", 3.5e11)):
        result = json.loads((results / f"cpu_{suite}.json").read_text())
        result["rates"]["float32_flops_per_second"] = rate
        (tmp_path / f"cpu_{suite}.json").write_text(json.dumps(result))
    report.write_report(tmp_path, "cpu")
    assert "A large matrix product in float32 ran at 300 to 420 GFLOP/s before the suites." in (
        (tmp_path / "cpu.md").read_text()
    )


def test_the_spread_of_runs_is_set_beside_the_results_that_stand_here():
    """Its column "below" repeats the generated table, and goes out of date with it."""
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    rows = text.split("| what | target | below |")[1].split("\n\n")[0].splitlines()[2:]
    targets = json.loads((ROOT / "blip3" / "benchmarks" / "results" / "cpu_targets.json").read_text())
    medians = {target["what"]: target["result"]["median"] for target in targets if target["result"]}
    assert len(rows) >= 6
    for row in rows:
        what, _, below = (cell.strip() for cell in row.split("|")[1:4])
        assert below.split()[0] == f"{medians[what]:.2f}x", what


def test_images_are_processed_by_both(results):
    rows = rows_of(results, "images")
    measured = rows["all sizes, from JPEG, 2 threads"]["values"].keys()
    assert {"ours, pil", "ours, torch", "LLaVA-NeXT, PIL", "resizes alone, pil", "resizes alone, torch"} <= measured
    assert {"ours, pil, bytes", "ours, torch, bytes"} <= measured
    assert rows["pixel_values of 16 images"]["ratio_to_first"]["float32"]["median"] == 4
    torchvision = [
        place["LLaVA-NeXT, torchvision"]
        for row in rows.values()
        for place in (row["values"], row["left_out"])
        if "LLaVA-NeXT, torchvision" in place
    ]
    assert torchvision, "it is measured, or the results say why not"


def test_generation_has_every_dtype_mode_and_batch(results):
    rows = rows_of(results, "generation")
    for dtype in machine.DTYPES:
        name = generation.name_of(dtype, [1], generation.EAGER)
        assert set(rows[f"{name}, first token"]["values"]) == {OURS, LLAVA, IDEFICS, BARE, generation.SAME_CACHE}
        assert "memory copy" in rows[f"{name}, each further token"]["values"]
        assert f"{generation.name_of(dtype, [3] * 4, generation.EAGER)}, first token" in rows
        assert f"{generation.name_of(dtype, [1], generation.STATIC)}, first token" in rows
    compiled = rows[f"{generation.name_of('float32', [1], generation.COMPILED)}, each further token"]
    assert OURS in compiled["values"]
    assert compiled["left_out"][IDEFICS]


def test_compiled_means_compiled():
    model = candidates.build(OURS, QUICK, "float32", "cpu")
    inputs = candidates.make_inputs(OURS, QUICK, [1], "cpu", "float32")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        generation.time_generation(model, inputs, 3, "cpu", **generation.cache_options(generation.COMPILED, True))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    generation.time_generation(model, inputs, 3, "cpu", **generation.cache_options(generation.COMPILED, True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "the third run compiled again"


def test_the_second_question_costs_no_tower_run(results):
    (row,) = rows_of(results, "questions").values()
    assert list(row["facts"]["tower_runs"].values()) == [1, 0, 0]


def test_a_prefill_makes_no_logits_of_every_token_and_no_resampler_scores(results):
    row = rows_of(results, "memory")["elements of a prefill, 1 image, float32"]
    assert row["facts"]["made"]["logits of every token"] is False
    assert row["facts"]["made"]["scores of a resampler layer"] is False


def test_eager_attention_would_be_noticed():
    """The check above sees what it looks for."""
    model = candidates.build(OURS, QUICK, "float32", "cpu", attn_implementation="eager")
    inputs = candidates.make_inputs(OURS, QUICK, [1], "cpu", "float32")
    record = products.record_products(lambda: model(**inputs))
    assert inputs["input_ids"].numel() * QUICK.vocab_size in record.elements
    assert 5 * QUICK.resampler_heads * QUICK.num_latents * (16 + QUICK.num_latents) in record.elements


def test_memory_was_measured_in_a_process_of_its_own(results, one_child_only):
    assert one_child_only[0] == "load"
    rows = rows_of(results, "memory")
    assert rows["from_pretrained, bfloat16, own"]["values"][OURS][0] > 0


def test_slopes_are_fitted_from_the_points(results):
    rows = rows_of(results, "scaling")
    line = rows["a further image, float32"]["facts"]["lines"][OURS]
    points = {count: rows[f"prefill, {count} image{'s' * (count > 1)}, float32"] for count in (1, 2, 4)}
    medians = {count: row["summary"][OURS]["median"] for count, row in points.items()}
    assert line["ms"] == pytest.approx(clock.slope(medians)[0])
    assert LLAVA in rows["prefill, 1 part, float32"]["left_out"]


def test_packed_batches_hold_less_padding(results):
    padding = rows_of(results, "training")["mixed lengths, float32"]["facts"]["padding"]
    assert padding["packed"] < padding["padded"]


def test_the_cache_of_the_bare_language_model_grows_in_place():
    """As ours does: fewer tensors are joined than with transformers' own cache."""
    model = candidates.build(BARE, QUICK, "float32", "cpu")
    inputs = candidates.make_inputs(BARE, QUICK, [0], "cpu", "float32")
    name = candidates.model_code("generation_blip3.CACHE_NAME")

    def joined(**cache):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            generation.time_generation(model, inputs, 6, "cpu", **cache)
        return sum(event.count for event in profiler.key_averages() if event.key == "aten::cat")

    joined_by_ours = joined(**{name: generation.growing_cache(model.config)})
    assert joined() - joined_by_ours == 2 * QUICK.text_layers * 5, "keys and values of each layer, each further token"


def test_the_bound_of_a_batch_is_its_arithmetic_and_its_further_tokens(results):
    rows = rows_of(results, "batching")
    first, further = (
        rows[f"3 mixed prompts, float32, {what} tokens of all"]["values"] for what in ("first", "further")
    )
    share = rows[batching.name_of_share(3, "float32")]["values"]
    batch = (first[batching.ONE_BATCH][0], further[batching.ONE_BATCH][0])
    bound = first[batching.ARITHMETIC][0] + batch[1]
    assert share[batching.ONE_BATCH][0] == pytest.approx(bound / sum(batch), rel=1e-4)
    assert batching.ARITHMETIC not in share


def test_idefics_cuts_by_its_own_rule_and_by_ours():
    layouts = peers.make_layouts(QUARTER)
    assert {name: candidates.count_image_tokens(*layout) for name, layout in layouts.items()} == {
        OURS: 640,
        peers.HALF: 320,
        IDEFICS: 405,
        peers.IDEFICS_OWN: 1053,
    }


def test_peers_are_measured_with_each_number_of_images(results):
    rows = rows_of(results, "peers")
    whole = [rows[peers.name_of(count, "float32")]["values"] for count in peers.COUNTS]
    assert all(set(values) == set(peers.make_layouts(QUICK)) for values in whole)
    parts = {part: rows[f"{peers.name_of_parts('float32')}, {part}"]["values"] for part in (*peers.PARTS, peers.REST)}
    assert len(rows) == len(whole) + len(parts)
    assert all(values[who][0] > 0 for values in parts.values() for who in (OURS, IDEFICS))


def test_a_prefill_is_divided_among_its_parts():
    """Time of a part is all that passes in its calls, and the rest is what passes outside."""

    class Slow(torch.nn.Module):
        def forward(self):
            time.sleep(0.02)

    slow = Slow()
    found = peers.divided({"slow": slow}, lambda: (slow(), time.sleep(0.03), slow()), "cpu")()
    assert found["slow"] >= 0.04
    assert found[peers.REST] >= 0.03


def test_busy_processes_are_busy_only_when_told_and_end():
    def seconds(process):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / 100  # of user and system, in hundredths

    with busy.BusyCores(1) as others:
        (process,) = others.processes
        before = seconds(process)
        time.sleep(0.3)
        assert seconds(process) == before
        with others.spinning():
            time.sleep(1)
        after = seconds(process)
        assert after - before > 0.1
        time.sleep(0.3)
        assert seconds(process) == after
    assert process.returncode == 0


def test_a_cold_start_has_three_phases(results, one_child_only):
    rows = rows_of(results, "cold-start")
    for name in (OURS, LLAVA):
        *phases, whole = (rows[f"cold start{suffix}"]["values"][name][0] for suffix in cold_start.PHASES.values())
        assert sum(phases) == pytest.approx(whole, rel=1e-3)
    parameters = rows["cold start, all"]["facts"]["parameters"]
    assert 0.5 < parameters[OURS] / parameters[LLAVA] < 2, "at like size"
    assert rows["cold start, import"]["values"][OURS][0] > 0.5, "in a process of its own"
    assert str(ROOT) in one_child_only


def test_a_cold_start_that_fails_is_quoted():
    with pytest.raises(RuntimeError, match=r"(?s)from nowhere.*before the first token"):
        START_AND_ANSWER(Path("nowhere"), 1)


def test_two_workers_feed_bytes_or_floats(results):
    rows = rows_of(results, "loader")
    facts = rows[loader.FEEDING]["facts"]
    assert 4 * facts["batch_bytes"]["bytes"] == facts["batch_bytes"]["float32"]
    alone, fed = (rows[name]["values"]["bytes"][0] for name in (loader.ALONE, loader.FEEDING))
    assert alone > fed, "a step takes time"


def test_records_of_the_loader_hold_files_of_what_was_rendered():
    record = loader.rendered_record(loader.TASK)
    (image,), (file,) = record.images, loader.with_files(record).images
    assert file.data.startswith(b"\x89PNG")
    assert file.open().tobytes() == image.open().tobytes()


def test_images_are_processed_on_threads_and_by_workers(results):
    row = rows_of(results, "scaling")[loader.BY_WORKERS]
    assert set(row["values"]) == {"0 workers", "1 worker", "2 workers", loader.THREADS}


def test_a_measurement_beside_busy_cores_is_long_enough():
    assert busy.count_calls(lambda: time.sleep(0.01), 0.1) in range(5, 11)


def test_busy_cores_are_met_by_a_large_image_and_on_one_thread(results):
    rows = rows_of(results, "busy")
    for name in (busy.FACTOR, busy.LARGE_FACTOR):
        assert busy.ONE_THREAD in rows[name]["values"]
        assert rows[name]["facts"]["calls"]


def test_memory_is_described_by_image_and_by_token():
    rows = {
        f"prefill, {count} images": {
            "summary": {OURS: {"median": mib}},
            "facts": {"image_tokens": {OURS: 640 * count}, "kib_per_image_token": {OURS: 1024 * mib / (640 * count)}},
        }
        for count, mib in ((1, 80.0), (3, 200.0))
    }
    assert scaling_report.describe_memory(rows) == [
        "- prefill, 1 images: ours 80.0 MiB for 640 image tokens, 128 KiB each.",
        "- prefill, 3 images: ours 200.0 MiB for 1,920 image tokens, 107 KiB each.",
        "- Between these, a further token: ours 96 KiB.",
    ]


def test_lines_are_described_where_they_stop_being_linear(results):
    rows = {
        f"prefill, {place} images": {
            "facts": {"what": "image", "place": place},
            "summary": {OURS: {"median": cost}, LLAVA: {"median": 5.0 * place}},
        }
        for place, cost in ((1, 3.0), (2, 5.0), (4, 9.0), (8, 34.0))
    }
    assert scaling_report.describe_lines(rows) == [
        "- images, ours: 4.51 ms each; linear up to 4; 8 take 2.00 times what the first two points foretell.",
        "- images, LLaVA-NeXT: 5 ms each; linear as far as it was measured, 8.",
    ]
    assert (results / "cpu_scaling.png").stat().st_size > 10_000
    assert "- views of an image, ours: " in (results / "cpu.md").read_text()


def test_views_grow_to_twelve_tiles_and_an_image_is_cut_by_three_lists_of_grids(results):
    rows = rows_of(results, "scaling")
    views = [row["facts"]["place"] for row in rows.values() if row["facts"].get("what") == "part"]
    assert views == [1, 2, 3, 4, 5, 7, 10, 13]
    facts = rows[f"{scaling.BY_GRIDS}, float32"]["facts"]
    assert facts["grid"]["the release's"] == [2, 2]
    tokens_of = list(facts["image_tokens"].values())
    assert tokens_of == sorted(tokens_of) and tokens_of[-1] > tokens_of[0]  # noqa: PT018


def test_a_point_that_runs_too_long_is_left_out_by_name():
    options = run.parse_arguments(["--quick", "--threads", "1", "--longest-run-seconds", "1e-9"])
    bench = run.with_rates(run.make_bench(options))
    found = scaling.measure_scaling(bench)
    assert set(found[0].left_out) == {OURS, LLAVA, IDEFICS}
    assert "would take" in found[0].left_out[OURS]


def test_targets_differ_by_device_where_a_bound_refuses_one():
    limits = {
        device: {target.what: target.limit for target in targets.make_targets(["float32"], device)}
        for device in ("cpu", "cuda")
    }
    name = "16 mixed prompts in a batch, tokens/s against one by one"
    assert (limits["cpu"][name], limits["cuda"][name]) == (None, 4.0)
    assert limits["cpu"]["the same batch, share of the bound"] == 0.9
    headlines = [target for target in targets.make_targets(["float32", "bfloat16"], "cpu") if target.headline]
    assert len(headlines) == 6
    assert any("405 tokens" in target.headline[1] for target in headlines), "Idefics3 at equal views"


# -- the candidates --------------------------------------------------------------------------------------------------


def test_the_true_sizes_are_the_releases():
    ours, released = (
        candidates.our_config(TRUE).to_dict(),
        json.loads((ROOT / "configs" / "4b" / "config.json").read_text()),
    )
    assert ours["tile_grids"] == released["tile_grids"]
    assert ours["resampler_config"]["num_latents"] == released["resampler_config"]["num_latents"]
    for section in ("vision_config", "text_config"):
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            assert ours[section][name] == getattr(candidates.our_config(TRUE), section).to_dict()[name]
            assert ours[section][name] == released[section].get(name, ours[section][name]), (section, name)
    assert ours["text_config"]["vocab_size"] == 32015


def test_a_quarter_keeps_tokens_and_heads():
    for name in ("tile_size", "patch_size", "num_latents", "resampler_head_dim", "patches_per_token"):
        assert getattr(QUARTER, name) == getattr(TRUE, name)
    assert QUARTER.vision_width // QUARTER.vision_heads == TRUE.vision_width // TRUE.vision_heads
    assert QUARTER.text_width // QUARTER.text_heads == TRUE.text_width // TRUE.text_heads
    for name in ("vision_width", "vision_mlp", "text_width", "text_layers", "text_mlp"):
        assert 4 * getattr(QUARTER, name) == getattr(TRUE, name)
    assert {kind: candidates.count_image_tokens(kind, QUARTER, (2, 2)) for kind in (OURS, LLAVA, IDEFICS)} == {
        OURS: 640,
        LLAVA: 3699,
        IDEFICS: 405,
    }


@pytest.mark.parametrize(
    ("kind", "sampling"), [(OURS, "patch"), (OURS, "fixed"), (LLAVA, "patch"), (IDEFICS, "patch")]
)
def test_inputs_hold_as_many_image_tokens_as_the_model_gives(kind, sampling, monkeypatch):
    """A model refuses any other number."""
    monkeypatch.setattr(candidates, "SAMPLING", sampling)
    model = candidates.build(kind, QUICK, "float32", "cpu")
    for grid in ((2, 1), (1, 3), (2, 2)):
        inputs = candidates.make_inputs(kind, QUICK, [1, 0, 2], "cpu", "float32", grid=grid)
        with torch.inference_mode():
            logits = model(**inputs, logits_to_keep=1).logits
        assert logits.shape == (3, 1, QUICK.vocab_size)
        count = int((inputs["input_ids"] == QUICK.image_token_id).sum())
        assert count == 3 * candidates.count_image_tokens(kind, QUICK, grid)


@pytest.mark.parametrize("sampling", ["patch", "fixed"])
def test_our_tokens_are_counted_as_the_configuration_samples(sampling, monkeypatch):
    monkeypatch.setattr(candidates, "SAMPLING", sampling)
    counted = {each.values[OURS][0] for each in tokens.measure_tokens(SimpleNamespace(say=lambda _: None))}
    assert counted == ({640} if sampling == "patch" else {128})


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clock", "candidates", "products", "report", "scaling"])
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(f"blip3.benchmarks.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_candidates_take_turns_and_the_first_round_warms_up():
    calls = []

    def candidate(name):
        return lambda: calls.append(name) or {"seconds": float(len(calls))}

    values = clock.measure_in_turn({"a": candidate("a"), "b": candidate("b")}, Effort(rounds=2, seconds=60))
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert values == {"seconds": {"a": [4.0, 5.0], "b": [3.0, 6.0]}}


def test_a_first_round_counts_where_everything_is_warm():
    for least, expected in ((0, [1.0]), (3, [1.0, 2.0, 3.0])):
        calls = []
        work = lambda calls=calls: calls.append(1) or {"seconds": float(len(calls))}  # noqa: E731
        values = clock.measure_in_turn({"slow": work}, Effort(rounds=5, seconds=1e-9), least, is_warm=True)
        assert values["seconds"]["slow"] == expected


def test_a_round_that_used_up_the_time_is_counted():
    for least, expected in ((0, [1.0]), (1, [2.0])):
        calls = []
        work = lambda calls=calls: calls.append(1) or {"seconds": float(len(calls))}  # noqa: E731
        values = clock.measure_in_turn({"slow": work}, Effort(rounds=5, seconds=1e-9), least)
        assert values["seconds"]["slow"] == expected


def test_ratios_are_taken_round_by_round():
    """A machine half as fast in one round changes no ratio."""
    row = Comparison("x", "s", {"ours": [1.0, 2.0, 1.0], "peer": [3.0, 6.0, 3.0]}).to_json()
    assert row["ratio_to_first"]["peer"] == {"median": 3.0, "low": 3.0, "high": 3.0, "count": 3}
    assert row["summary"]["ours"]["median"] == 1.0


def test_means_over_sizes_are_geometric():
    comparisons = [{"ours": [1.0, 1.0], "peer": [2.0, 4.0]}, {"ours": [10.0, 10.0], "peer": [80.0, 40.0]}]
    assert clock.geometric_mean_rounds(comparisons, "peer", "ours") == pytest.approx([4.0, 4.0])


def test_products_of_a_known_model_are_all_found():
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4, bias=False))
    record = products.record_products(lambda: layers(torch.zeros(3, 8)))
    assert record.products == Counter({(1, 3, 8, 16): 1, (1, 3, 16, 4): 1})
    assert products.count_flops(record.products) == 2 * 3 * (8 * 16 + 16 * 4)
    query = torch.zeros(2, 4, 10, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    record = products.record_products(lambda: attend(query, query, query, is_causal=True))
    assert products.count_flops(record.products) == 2 * 2 * 8 * 10 * 8 * 5
    products.bare_products(record.products, torch.float32, "cpu")()


def test_the_prediction_is_near_the_products_counted():
    for kind in (OURS, LLAVA, BARE):
        model = candidates.build(kind, QUICK, "float32", "cpu")
        inputs = candidates.make_inputs(kind, QUICK, [1], "cpu", "float32")
        counted = products.count_flops(
            products.record_products(lambda model=model, inputs=inputs: model(**inputs)).products
        )
        assert 0.4 < candidates.predict_flops(kind, QUICK, [1]) / counted < 1.5, kind


# -- report -----------------------------------------------------------------------------------------------------------


def test_aims_are_scored_by_median_and_say_by_how_much_they_are_missed():
    rows = {"p: n": {"values": {"ours": [1.0, 1.0, 1.0], "peer": [2.0, 2.4, 9.0]}}}
    reached = targets.Target("a", 2.0, True, targets.ratio("p", "n", "peer", "ours")).compare(rows)
    assert (reached["reached"], reached["missed_by"], reached["result"]["median"]) == (True, 0.0, 2.4)
    missed = targets.Target("a", 3.0, True, targets.ratio("p", "n", "peer", "ours")).compare(rows)
    assert (missed["reached"], missed["missed_by"], missed["target"]) == (False, 0.2, "at least 3x")
    unknown = targets.Target("a", 3.0, True, targets.ratio("p", "n", "absent", "ours")).compare(rows)
    assert (unknown["reached"], unknown["result"]) == (None, None)
    lines = report.targets_table([reached, missed, unknown])
    assert lines[2:] == [
        "| a | at least 2x | 2.4x (2.2 to 5.7) | yes |",
        "| a | at least 3x | 2.4x (2.2 to 5.7) | no, missed by 20% |",
        "",
        "Not measured: a (1 of 3 rows).",
    ]
    assert report.targets_table([reached])[2:] == lines[2:3]


def test_what_was_not_measured_is_named_by_kind():
    """A row that speaks of the one before counts with it."""
    measured = {"median": 1.0, "low": 1.0, "high": 1.0, "count": 1}
    names = ["start", "of that, import", "batch, bytes", "the same, padded", "peak", "rate"]
    targets = [
        {"what": name, "target": "reported", "result": measured if name in ("batch, bytes", "rate") else None}
        | {"unit": "x", "reached": None, "missed_by": None}
        for name in names
    ]
    *rows, blank, line = report.targets_table(targets)
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| batch, bytes", "| rate"]
    assert (blank, line) == ("", "Not measured: start (2 of 2 rows); batch (1 of 2 rows); peak.")
    assert report.targets_table([target for target in targets if not target["result"]])[0].startswith("Not measured: ")


def test_every_target_finds_what_it_measures_in_the_results(results):
    """A renamed comparison would silently be "not measured"."""
    scored = json.loads((results / "cpu_targets.json").read_text())
    not_measured = {target["what"] for target in scored if target["result"] is None}
    allowed = (
        "torchvision",
        "16 mixed prompts",
        "the same with",
        "the same in",
        "the same batch",
    )  # three in a quick run
    assert all(any(words in what for words in allowed) for what in not_measured), not_measured
    assert len(scored) > 20


def test_tables_and_plot_are_written(results):
    text = (results / "cpu.md").read_text()
    for suite in run.SUITES:
        assert f"## {suite}\n" in text
    assert (results / "cpu.png").stat().st_size > 10_000
    tables = re.findall(r"(?:\|.*\n)+", text)
    widths = [{line.count("|") for line in table.splitlines()} for table in tables]
    assert all(len(width) == 1 for width in widths)


def test_documents_are_filled_between_their_marks_only(results, tmp_path):
    document = tmp_path / "speed.md"
    document.write_text(DOCUMENT)
    assert report.update_documents(results, "cpu", [document]) == [document]
    filled = document.read_text()
    assert "| image processing to bytes, bit-exact backend" in filled
    assert report.update_documents(results, "cpu", [document]) == [], "the second time nothing changes"
    strip = re.compile(r"<!-- benchmarks:cpu:\w+ -->.*?<!-- end -->", flags=re.DOTALL)
    assert strip.sub("", filled) == strip.sub("", DOCUMENT)


@pytest.mark.skipif(not list(run.RESULTS.glob("cpu_*.json")), reason="nothing was measured yet")
def test_the_documentation_says_what_the_results_say():
    results = report.read_results(run.RESULTS, "cpu")
    targets = report.compare(results)
    assert "\n".join(report.targets_table(targets)) in DOCUMENT
    headlines = report.headline_table(targets)
    assert 2 < len(headlines) <= 2 + 6
    assert "\n".join(headlines) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_documentation_names_every_suite_and_only_real_options(capsys):
    table = DOCUMENT.split("## Suites")[1].split("## Targets")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, flags=re.MULTILINE)) == set(run.SUITES)
    with pytest.raises(SystemExit):
        run.main(["--help"])
    usage = capsys.readouterr().out
    lines = [line for line in DOCUMENT.splitlines() if "bench-gpu" not in line and "benchmarks.gpu" not in line]
    options = set(re.findall(r"--[a-z][a-z-]+", "\n".join(lines))) - {"--minutes"}  # test_gpu.py reads those
    assert options
    assert options <= set(re.findall(r"--[a-z][a-z-]+", usage))


# -- bad options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "4096"], "threads were asked for"),
        (["--rounds", "0"], "rounds is 0"),
        (["--seconds", "-1"], "seconds is -1"),
        (["--device", "tpu"], "The device is 'tpu'"),
        (["--quick", "--update-docs"], "times mean nothing"),
        (["--quick", "--output", str(run.RESULTS)], "times mean nothing"),
        (["--only-report"], "holds no cpu_"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path, capsys):
    output = [] if "--output" in options or "--update-docs" in options else ["--output", str(tmp_path)]
    assert run.main([*options, *output]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    assert run.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "CUDA build" in capsys.readouterr().err


def test_an_unknown_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--suite", "speed"])
    assert "invalid choice" in capsys.readouterr().err


def test_a_child_that_fails_is_quoted():
    bench = run.with_rates(run.make_bench(run.parse_arguments(["--quick", "--threads", "1"])))
    with pytest.raises(RuntimeError, match=r"(?s)'task': 'load'.*nowhere"):
        RUN_CHILD(bench, "load", folder="nowhere", kind=OURS, dtype="float32")
