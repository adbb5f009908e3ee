# SPDX-License-Identifier: Apache-2.0
"""Stage 0: labels lie where things are rendered, the loss is SigLIP's, only tower and asked-for resampler change."""

import itertools
import json
import shutil
import textwrap

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoTokenizer

from blip3.data.canvas import Drawing, Shape, Text, shape_box
from blip3.hub import model_code
from blip3.training.recipe import TowerRecipe, load_recipe, save_recipe
from blip3.training.small.new_model import make_model
from blip3.training.small.publish import publish_tower
from blip3.training.tower import labels
from blip3.training.tower import model as siglip_model
from blip3.training.tower import train as stage
from blip3.world.settings import settings_from
from blip3.world.tasks import rendered_record
from support import load_model
from support.processes import expect_success, start
from support.training import WORLD, losses_of, weights_in, write_sizes

TILE, PER_SIDE = 48, 4
PATCH = TILE // PER_SIDE
TOWER = "model.vision_tower."
view_places = model_code("tiling_blip3.view_places")


@pytest.fixture(scope="module")
def image_processor(small_model):
    return AutoImageProcessor.from_pretrained(small_model, trust_remote_code=True)


@pytest.fixture(scope="module")
def tokenizer(small_model):
    return AutoTokenizer.from_pretrained(small_model, trust_remote_code=True)


def tower_recipe(small_model, output, **changes: object) -> TowerRecipe:
    values = {
        "model": str(small_model),
        "output": str(output),
        "world": WORLD,
        "tasks": ["ocr"],
        "max_steps": 30,
        "batch_size": 6,
        "learning_rate": 3e-3,
        "text_width": 32,
        "text_layers": 1,
        "log_every": 1,
        "save_every": 15,
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values | changes))
    return load_recipe(path, TowerRecipe)


def places_of(image_size, image_processor) -> list[tuple[float, float, float, float]]:
    """How an image's pixels map to its global view and to each tile."""
    return view_places(image_size, image_processor.grid_of(*image_size), TILE)


def labelled(regions, image_size, image_processor) -> list[dict[str, set[tuple[int, int]]]]:
    """For each part of an image: the (row, column) of the patches under each name."""
    found = []
    for place in places_of(image_size, image_processor):
        marked = labels.label_patches(regions, place, TILE, PER_SIDE).reshape(PER_SIDE, PER_SIDE, -1)
        places = {}
        for name, index in labels.name_index(PER_SIDE).items():
            places[name] = {(int(row), int(column)) for row, column in np.argwhere(marked[..., index])}
        found.append(places)
    return found


def square_of(*cells: tuple[range, range]) -> set[tuple[int, int]]:
    return {(row, column) for rows, columns in cells for row in rows for column in columns}


# -- geometry, by hand ------------------------------------------------------------------------------------------------


def test_a_wide_image(image_processor):
    """48 x 96 pixels fill two tiles side by side at scale 1; the global view halves the width."""
    regions = [(("square", "red"), (12, 12, 36, 36)), (("moon", "blue"), (60, 24, 96, 48))]
    whole, left, right = labelled(regions, (48, 96), image_processor)
    assert left["square"] == left["red"] == square_of((range(1, 3), range(1, 3)))
    assert right["moon"] == right["blue"] == square_of((range(2, 4), range(1, 4)))
    assert not left["moon"]
    assert not right["square"]
    assert whole["square"] == square_of((range(1, 3), range(2)))  # 6 to 18 pixels: half of either column
    assert whole["moon"] == square_of((range(2, 4), range(2, 4)))  # 30 to 48: half of column 2, all of column 3
    for part in (whole, left, right):
        assert part["row 2"] == square_of((range(1, 2), range(4)))
        assert part["column 4"] == square_of((range(4), range(3, 4)))
        assert "row 5" not in part


def test_a_tall_image_with_padding(image_processor):
    """60 x 40 pixels become 72 x 48 in two tiles one above the other, 12 pixels of padding above and below."""
    whole, upper, lower = labelled([(("cup", "pink"), (10, 10, 30, 30))], (60, 40), image_processor)
    assert upper["cup"] == square_of((range(2, 4), range(1, 3)))  # 12..36 across, 24..48 down
    assert not lower["cup"]
    assert whole["cup"] == square_of((range(1, 2), range(1, 3)))  # 8..24 down: 4 of row 0, all of row 1; 12..36 across


def test_a_small_thing_lies_under_the_patch_that_holds_it(image_processor):
    regions = [(("A",), (14, 2, 18, 10)), (("B",), (22, 2, 26, 10))]
    _, left, _ = labelled(regions, (48, 96), image_processor)
    assert left["A"] == {(0, 1)}
    assert left["B"] == {(0, 1), (0, 2)}  # half of it under either


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([(48, 96), (60, 40), (96, 48), (70, 90), (50, 120)]),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    side=st.integers(24, 40),
)
def test_labels_are_where_the_ink_is(image_processor, size, corner, side):
    height, width = size
    place = (int(corner[0] * (width - side)), int(corner[1] * (height - side)))
    shape = Shape("square", "#ff0000", place, side)
    drawing = Drawing(size, ("plain", "#ffffff"), (shape,))
    pixels = image_processor(drawing.paint(), return_tensors="pt")["pixel_values"][0]
    parts = labelled([(("square", "red"), shape_box(shape))], size, image_processor)
    assume(all((edge - first) > PATCH for first, edge in zip(shape_box(shape)[:2], shape_box(shape)[2:], strict=True)))
    for tile, part in zip(pixels, parts, strict=False):
        is_red = (tile[0] > 0) & (tile[1] < 0)
        share = is_red.float().view(PER_SIDE, PATCH, PER_SIDE, PATCH).mean((1, 3))
        for row, column in itertools.product(range(PER_SIDE), repeat=2):
            if not 0.2 < share[row, column] < 0.5:  # what lies near the threshold may fall either way by a pixel
                is_labelled = (row, column) in part["square"]
                assert is_labelled == bool(share[row, column] >= labels.MIN_OVERLAP), (row, column)


def test_characters_lie_where_they_are_rendered():
    mark = Text("7K-Q", "Aileron", 30, "#000000", (10, 40))
    regions = labels.character_regions(mark)
    assert [names for names, _ in regions] == [("7",), ("K",), ("Q",)]  # the dash is no character to learn
    pixels = np.array(Drawing((60, 120), ("plain", "#ffffff"), (mark,)).paint().convert("L")) < 128
    for _, (x1, y1, x2, y2) in regions:
        ink = pixels[:, round(x1) : round(x2)]
        rows = np.flatnonzero(ink.any(1))
        assert rows.size
        assert y1 - 1 <= rows[0]
        assert rows[-1] <= y2 + 1
    assert pixels[:, : round(regions[0][1][0]) - 1].sum() == 0
    assert pixels[:, round(regions[-1][1][2]) + 1 :].sum() == 0


def test_captions_name_what_a_tile_shows_half_of(image_processor):
    regions = [
        (("square", "red"), (12, 12, 36, 36)),
        (("moon", "blue"), (40, 0, 70, 20)),  # 8 of 30 pixels in the left tile
        (("7",), (2, 40, 8, 46)),
        (("K",), (44, 40, 52, 46)),  # half in either
    ]
    whole, left, right = (labels.caption_of(regions, place, TILE) for place in places_of((48, 96), image_processor))
    assert whole == 'red square, blue moon "7K"'
    assert left == 'red square "7K"'
    assert right == 'blue moon "K"'
    assert labels.caption_of(regions[:1], places_of((48, 96), image_processor)[2], TILE) == "nothing"
    assert labels.caption_of([], (1, 1, 0, 0), TILE) == "nothing"


def test_regions_are_those_of_the_record():
    record = rendered_record("caption", settings=settings_from(WORLD))
    drawing = record.images[0].drawing
    regions = labels.regions_of(record, drawing)
    shapes = [mark for mark in drawing.marks if isinstance(mark, Shape)]
    assert [names[0] for names, _ in regions] == [shape.thing for shape in shapes]
    for (_, box), shape in zip(regions, shapes, strict=True):
        assert box == pytest.approx(shape_box(shape), abs=1)


def test_images_never_change_and_splits_differ(small_model, image_processor, tmp_path):
    recipe = tower_recipe(small_model, tmp_path / "tower", parts=2)
    train, again, held_out = (
        stage.TowerImages(recipe, settings_from(WORLD), image_processor, split, PER_SIDE)
        for split in ("train", "train", "held_out")
    )
    assert len(train) == 180
    for index in (5, 0):
        one, same, other = train[index], again[index], held_out[index]
        assert torch.equal(one["pixel_values"], same["pixel_values"])
        assert torch.equal(one["names"], same["names"])
        assert one["captions"] == same["captions"]
        assert one["pixel_values"].shape == (2, 3, TILE, TILE)
        assert not torch.equal(one["pixel_values"][0], other["pixel_values"][0])


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_sigmoid_loss_by_hand():
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    expected = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0))]
    assert siglip_model.sigmoid_loss(logits, labels)[0].tolist() == pytest.approx(expected)


@pytest.fixture
def siglip(small_model, tokenizer, tmp_path):
    model = load_model(small_model)
    return siglip_model.PatchSiglip(model.vision_tower, tokenizer, tower_recipe(small_model, tmp_path / "tower"))


@pytest.fixture
def batch(small_model, image_processor, tokenizer, tmp_path):
    images = stage.TowerImages(
        tower_recipe(small_model, tmp_path / "tower"), settings_from(WORLD), image_processor, "train", PER_SIDE
    )
    return stage.TowerCollator(tokenizer, 32)([images[index] for index in range(4)])


def test_the_image_level_is_siglips_own_loss(siglip, batch):
    """With no two captions alike, what the level adds is what transformers' SiglipModel computes."""
    batch["is_same"] = torch.eye(len(batch["is_same"]))
    siglip.image_weight = 0.0
    without = siglip(**batch)["loss"]
    siglip.image_weight = 1.0
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids")}
    expected = siglip.siglip(**inputs, return_loss=True).loss
    assert (siglip(**batch)["loss"] - without).item() == pytest.approx(expected.item(), rel=1e-5)


def test_equal_captions_are_no_negatives(batch, tokenizer):
    captions = [tokenizer.decode(row) for row in batch["input_ids"]]
    for row, one in enumerate(captions):
        for column, other in enumerate(captions):
            assert bool(batch["is_same"][row, column]) == (one == other)
    assert batch["is_same"].diagonal().all()


def test_patches_without_things_still_have_a_loss(siglip, batch):
    batch["names"] = torch.zeros_like(batch["names"])
    assert torch.isfinite(siglip(**batch)["loss"])


@pytest.fixture
def with_resampler(small_model, tokenizer, tmp_path):
    model = load_model(small_model)
    recipe = tower_recipe(small_model, tmp_path / "tower", resampler=True, image_weight=0)
    return siglip_model.PatchSiglip(model.vision_tower, tokenizer, recipe, model.model.resampler)


def test_the_latents_level_adds_to_the_loss_and_learns(with_resampler, batch):
    with_resampler(**batch)["loss"].backward()
    learning = {name.split(".")[0] for name, weight in with_resampler.named_parameters() if weight.grad is not None}
    assert learning == {"siglip", "patch_naming", "resampler", "reader", "latent_naming"}
    assert not [
        name for name, weight in with_resampler.named_parameters() if weight.requires_grad == (weight.grad is None)
    ]


def test_latents_are_read_as_the_model_makes_them(with_resampler, batch, small_model):
    """Tiles with more and less padding in one call: each equals its visible patches resampled alone."""
    patches = torch.randn(4, PER_SIDE**2, with_resampler.resampler.config.hidden_size)
    is_visible = torch.ones(4, PER_SIDE**2, dtype=torch.bool)
    is_visible[1, :4] = is_visible[2, :4] = is_visible[3, 2:] = False
    vectors = with_resampler.read_latents(patches, is_visible)
    for tile, mask, read in zip(patches, is_visible, vectors, strict=True):
        alone = with_resampler.resampler(tile[mask], [(1, int(mask.sum()))])
        torch.testing.assert_close(read, with_resampler.reader(alone)[0])
    hidden = torch.where(is_visible.unsqueeze(-1), patches, torch.randn_like(patches))
    assert torch.equal(with_resampler.read_latents(hidden, is_visible), vectors)


def test_visible_patches_are_those_that_show_image(image_processor, small_model, tmp_path):
    """Padding is black and rendered images are light: hidden patches are mostly black, visible ones mostly not."""
    recipe = tower_recipe(small_model, tmp_path / "tower", parts=9)
    images = stage.TowerImages(recipe, settings_from(WORLD), image_processor, "train", PER_SIDE)
    black, visible = [], []
    for sample in (images[index] for index in range(12)):
        patches = sample["pixel_values"].unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3)
        black.append((patches.amax(1) == patches.min()).float().mean((-1, -2)).flatten())
        visible.append(sample["is_visible"].flatten())
    black, is_visible = torch.cat(black), torch.cat(visible)
    assert (~is_visible).sum() > 50
    assert black[~is_visible].min() >= 0.5
    assert black[is_visible].mean() < 0.1


# -- several processes ------------------------------------------------------------------------------------------------

SCRIPT = """
    import json, os
    from pathlib import Path
    from blip3.training.tower import train

    real_get, asked = train.TowerImages.__getitem__, Path(__file__).with_name(f"asked-{os.environ['RANK']}")

    def get(self, index):
        if self.split == "train":
            with asked.open("a") as file:
                file.write(f"{index}\\n")
        return real_get(self, index)

    train.TowerImages.__getitem__ = get
    train.main()
"""


def asked_by(folder, processes: int, **changes: object) -> list[list[int]]:
    """Train in several processes, and give which images each looked at."""
    script, path = folder / "script.py", folder / "run.yaml"
    script.write_text(textwrap.dedent(SCRIPT))
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    for old in folder.glob("asked-*"):
        old.unlink()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes)
    expect_success(start(*launcher, script, path, modules=folder / "modules"))
    return [[int(line) for line in path.read_text().split()] for path in sorted(folder.glob("asked-*"))]


def test_processes_see_different_images_and_another_number_goes_on_with_the_rest(small_model, tmp_path):
    changes = {"max_steps": 4, "save_every": 2, "batch_size": 2, "parts": 1}
    save_recipe(tower_recipe(small_model, tmp_path / "run", **changes), tmp_path / "run.yaml")
    first, second = asked_by(tmp_path, 2)
    assert len(first) == len(second) == 8
    assert sorted(first + second) == list(range(16))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (alone,) = asked_by(tmp_path, 1, accumulation=2)
    assert sorted(alone) == sorted(first[4:] + second[4:]), "steps 3 and 4 have the images that they had"


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(small_model, tmp_path_factory):
    """The folder of a short run."""
    output = tmp_path_factory.mktemp("tower") / "run"
    assert stage.train_tower(tower_recipe(small_model, output)) == output / "final"
    return output


@torch.no_grad()
def fall_of_loss(siglip, batch, checkpoint) -> float:
    """Loss of one batch with the weights of a checkpoint, over that of the beginning; steps show other kinds each."""
    before = siglip(**batch)["loss"].item()
    siglip.load_state_dict(weights_in(checkpoint))
    return siglip(**batch)["loss"].item() / before


def test_a_few_steps_reduce_the_loss(trained, siglip, batch):
    assert len(losses_of(trained)) == 30
    assert fall_of_loss(siglip, batch, trained / "checkpoint-30") < 0.9


def test_the_final_folder_has_the_trained_tower_and_the_rest_unchanged(trained, small_model):
    before, after = weights_in(small_model), weights_in(trained / "final")
    siglip = weights_in(trained / "checkpoint-30")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith(TOWER):
            inner = name.removeprefix(TOWER).removeprefix("vision_model.")
            assert torch.equal(tensor, siglip[f"siglip.vision_model.{inner}"]), name
        else:
            assert torch.equal(tensor, before[name]), name
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) > 20
    assert (trained / "final" / "recipe.yaml").is_file()
    model = load_model(trained / "final")
    assert torch.equal(
        dict(model.named_parameters())[
            next(name for name, _ in model.named_parameters() if "patch_embedding.w" in name)
        ],
        after[f"{TOWER}vision_model.embeddings.patch_embedding.weight"],
    )


def test_states_keep_the_names_that_earlier_runs_saved(trained, with_resampler):
    extra = {name.split(".")[0] for name in with_resampler.state_dict()}
    assert extra == {"siglip", "patch_naming", "resampler", "reader", "latent_naming"}
    names = set(with_resampler.state_dict())
    assert {"patch_naming.naming.weight", "patch_naming.presence.bias", "latent_naming.naming.bias"} <= names
    assert {"reader.queries", "reader.latent_norm.weight", "reader.attention.in_proj_weight"} <= names
    tower = {name for name in weights_in(trained / "checkpoint-30") if "patch_embedding" in name}
    assert tower == {f"siglip.vision_model.embeddings.patch_embedding.{kind}" for kind in ("weight", "bias")}


def test_a_resumed_tower_is_the_same(trained, small_model, tmp_path):
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-30", "final", "recipe.yaml"))
    stage.train_tower(tower_recipe(small_model, tmp_path / "run"))
    assert losses_of(tmp_path / "run") == losses_of(trained)
    resumed, straight = weights_in(tmp_path / "run" / "final"), weights_in(trained / "final")
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.fixture(scope="module")
def trained_with_resampler(small_model, tmp_path_factory):
    """The folder of a short run that trains a resampler too."""
    output = tmp_path_factory.mktemp("tower") / "run"
    changes = {"resampler": True, "image_weight": 0, "max_steps": 15, "optimizer": "soap"}
    stage.train_tower(tower_recipe(small_model, output, **changes))
    return output


def test_a_resampler_trained_beside_the_tower_is_kept(trained_with_resampler, small_model, with_resampler, batch):
    before, after = weights_in(small_model), weights_in(trained_with_resampler / "final")
    assert fall_of_loss(with_resampler, batch, trained_with_resampler / "checkpoint-15") < 0.9
    changed = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"vision_tower", "resampler"}
    figures = json.loads((trained_with_resampler / "metrics.json").read_text())
    assert {f"held_out_{kind}{level}" for kind in labels.KINDS for level in ("", "_from_latents")} == set(figures)
    assert all(0 <= figure <= 1 for figure in figures.values())


def test_a_published_tower_loads_and_starts_a_new_model(trained_with_resampler, tmp_path):
    published = tmp_path / "tower"
    publish_tower(trained_with_resampler / "final", published)
    tower, report = AutoModel.from_pretrained(published, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    resampler = published / "resampler.safetensors"
    make_model(write_sizes(tmp_path), tmp_path / "new", samples=20, tower=published, resampler=resampler)
    model, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "new", trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"]
    pixels = torch.rand(2, 3, TILE, TILE)
    with torch.no_grad():
        expected = tower.float()(pixels).last_hidden_state
        assert torch.equal(model.vision_tower(pixels).last_hidden_state, expected)
    loaded = model.model.resampler.state_dict()
    for name, weight in load_file(resampler).items():
        assert torch.equal(loaded[name], weight.float()), name


# -- other numbers of patches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_side", [6, 8, 12])
def test_labels_have_a_name_for_each_row_and_column_of_the_model(per_side):
    marked = labels.label_patches([], (1.0, 1.0, 0.0, 0.0), 96, per_side)
    names = labels.name_index(per_side)
    assert marked.shape == (per_side**2, 30 + 10 + 62 + 2 * per_side)
    grid = marked.reshape(per_side, per_side, -1)
    for step in range(per_side):
        assert grid[step, :, names[f"row {step + 1}"]].all()
        assert grid[:, step, names[f"column {step + 1}"]].all()
    assert marked.sum() == 2 * per_side**2, "and no patch has another"
    assert f"row {per_side + 1}" not in names


def test_names_stand_where_runs_of_eight_patches_a_side_learned_them():
    """A naming layer of such a run, resumed, must find each name under its old number."""
    names = labels.name_index(8)
    assert list(names) == labels.patch_names(8)
    assert (names["A"], names["z"], names["9"]) == (40, 91, 101)
    assert [names[name] for name in ("row 1", "row 8", "column 1", "column 8")] == [102, 109, 110, 117]
    assert labels.patch_kinds(8) == {
        "thing": slice(0, 30),
        "colour": slice(30, 40),
        "character": slice(40, 102),
        "row": slice(102, 110),
        "column": slice(110, 118),
    }


@pytest.mark.parametrize("per_side", [6, 8, 12])
def test_the_number_of_patches_is_the_models(per_side, tmp_path):
    sizes = write_sizes(tmp_path)
    tile = f"vision_config.image_size={12 * per_side}"
    make_model(sizes, tmp_path / "new", samples=5, overrides=[tile, "vision_config.num_hidden_layers=1"])
    changes = {"max_steps": 1, "batch_size": 2, "save_every": 1, "resampler": True}
    final = stage.train_tower(tower_recipe(tmp_path / "new", tmp_path / "run", **changes))
    saved = weights_in(tmp_path / "run" / "checkpoint-1")
    assert saved["patch_naming.naming.weight"].shape[0] == len(labels.patch_names(per_side))
    assert saved["reader.queries"].shape[0] == per_side**2
    assert load_model(final).config.vision_config.image_size == 12 * per_side
