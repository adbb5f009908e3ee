# SPDX-License-Identifier: Apache-2.0
"""The small JSON files of a checkpoint: the released ones in our words, and back.

In: JSON files and the shapes of tensors. Out: the contents of our config.json and preprocessor_config.json, or of the
released ones. The files in configs/4b are the templates; sizes are read off the tensors.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..hub import RELEASE, ROOT, model_code
from .names import DEAD_ROWS, EMBEDDING, IMAGE_TOKENS, TIMM
from .tensors import Views, shape_of
from .towers import given_sizes, is_clip

TEMPLATES = ROOT / RELEASE
# What the text_config of every release says, for a checkpoint that comes without one.
RELEASED_TEXT = {"vocab_size": 32064, "initial_tokenizer_len": 32012, "sliding_window": 2047}
# The first family's tower, DFN5B ViT-H/14 at 378 pixels, and the statistics of CLIP's pixels.
CLIP_TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 378,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "attention_dropout": 0.0,
}
CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
TIMM_KEYS = ("architecture", "model_args", "do_pooling", "hidden_size", "image_size", "patch_size")
MODEL_TYPES = ("xgenmm", "blip_3")  # the second is the first family's
TEXT_QUERIES = 256  # of the first family's instruct model


@dataclass
class Checkpoint:
    """A source in one common form: released names, text projections fused, added rows folded in.

    `config` is our config.json with a phi3 text_config; its image_token_id is also the number of original token ids.
    """

    views: Views
    unused: Views  # what the model never uses, kept for the way back
    config: dict
    preprocessor: dict
    generation: dict
    variant: str  # "instruct" or "base"
    description: str
    tokenizer: Path  # folder with the tokenizer's files
    small_files: dict[str, Path] = field(default_factory=dict)  # original files by name, kept for the way back
    is_ours: bool = False
    dtype_changed: bool = False  # since the release
    text_layout: str = "fused"  # of the source: "fused" or "unfused"
    template_folders: tuple[Path, ...] = (TEMPLATES,)  # where files that are copied are looked for, in this order
    quantization: str | None = None  # method, where the weights are no tensors of the model
    origin: Any = None  # `conversion.card.Origin`


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        ValueError: if the file is not JSON, or another value than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not JSON ({error}); expected an object. It is probably cut off "
            "or a Git LFS pointer: download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) holds a JSON {type(content).__name__}; expected an object with "
            "names. It is probably another file under this name: download it again."
        )
    return content


def read_sizes(path: Path) -> dict:
    """Read a JSON object that describes a model.

    Raises:
        ValueError: if it is no JSON object, or a size in it is one that no model has.
    """
    content = read_json(path)
    model_code("configuration_blip3.check_sizes")(str(path), content)
    return content


def optional_json(path: Path) -> dict | None:
    """Read a JSON object, or return None when there is no such file."""
    return read_json(path) if path.is_file() else None


def template() -> dict:
    """Return the config.json of configs/4b."""
    return read_json(TEMPLATES / "config.json")


def build_config(config: dict, config_class: Any = None) -> Any:
    """Build, and so validate, the configuration object of a config.json.

    Raises:
        ValueError: if a value is refused.
    """
    if config_class is None:
        config_class = model_code("configuration_blip3.Blip3Config")
    ignored = ("dtype", "auto_map", "transformers_version")
    try:
        return config_class.from_dict({key: value for key, value in config.items() if key not in ignored})
    except ValueError:
        raise
    except Exception as error:  # transformers' own checks raise many kinds, all about the values
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"transformers refuses the configuration ({type(error).__name__}: {reason}); expected the values of a "
            "released config.json. A value of the source's is probably of another kind, such as a text in place of a "
            "number: download its config.json again."
        ) from error


# -- Parts of our config.json -----------------------------------------------------------------------------------------


def vision_config_of(views: Views, given: dict | None, image_size: int | None) -> dict:
    """Infer the tower's sizes from its tensors; heads and image size are those given, or the known towers'.

    Args:
        views: released names.
        given: the tower's configuration, see `given_sizes`.
        image_size: pixels, where `given` does not tell.

    Raises:
        ValueError: if the number of heads is unknown, or the positions do not fit the image size.
    """
    if f"vision_encoder.{TIMM}patch_embed.proj.weight" in views:
        return _timm_config_of(views, given or {})
    config = dict(CLIP_TOWER) if is_clip(views) else template()["vision_config"]
    hidden, channels, patch, _ = shape_of(views, "vision_encoder.embeddings.patch_embedding.weight")
    given = given_sizes(given)
    if "num_attention_heads" not in given and hidden != config["hidden_size"]:
        known = "DFN5B ViT-H" if is_clip(views) else "SigLIP-SO400M"
        raise ValueError(
            f"The vision tower has width {hidden}, and only width {config['hidden_size']} ({known}) is known to "
            "have 16 heads; tensors do not tell the number of heads. Pass its config.json, or open_clip_config.json, "
            "with --vision-config."
        )
    side = given.get("image_size") or image_size or config["image_size"]
    config |= {key: value for key, value in given.items() if key in config and key != "model_type"}
    config |= {
        "hidden_size": hidden,
        "patch_size": patch,
        "num_channels": channels,
        "intermediate_size": shape_of(views, "vision_encoder.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _num_layers(views, "vision_encoder.encoder.layers."),
        "image_size": side,
    }
    if not is_clip(views):
        config["vision_use_head"] = False
    positions = shape_of(views, "vision_encoder.embeddings.position_embedding.weight")[0] - is_clip(views)
    if positions != (config["image_size"] // patch) ** 2:
        raise ValueError(
            f"The vision tower has {positions} positions, but an image of {config['image_size']} pixels in patches of "
            f"{patch} has {(config['image_size'] // patch) ** 2}. The image size is probably another one: pass the "
            "tower's config.json with --vision-config."
        )
    return config


def _timm_config_of(views: Views, given: dict) -> dict:
    """Return the `timm_wrapper` configuration of a tower that keeps timm's names."""
    given = given.get("vision_config", given)
    hidden, _, patch, _ = shape_of(views, f"vision_encoder.{TIMM}patch_embed.proj.weight")
    sizes = {"hidden_size": hidden, "image_size": given_sizes(given).get("image_size"), "patch_size": patch}
    if sizes["image_size"] is None:
        raise ValueError(
            f"The config.json of the timm tower {given.get('architecture')!r} gives no image size; expected three "
            "numbers under pretrained_cfg.input_size. It was probably written by hand: add them."
        )
    args = {"global_pool": "", **(given.get("model_args") or {}), "img_size": sizes["image_size"]}
    names = {"model_type": "timm_wrapper", "architecture": given["architecture"], "model_args": args}
    return {**names, "do_pooling": False, **sizes}


def resampler_config_of(views: Views, source: dict) -> dict:
    """Infer the resampler's sizes from its tensors; heads are 96 channels wide in every release.

    Args:
        views: released names.
        source: the released config.json, or empty.
    """
    config = template()["resampler_config"]
    inner = shape_of(views, "vision_tokenizer.layers.0.0.to_q.weight")[0]
    latents, hidden = shape_of(views, "vision_tokenizer.latents")
    sampling = source.get("vision_encoder_config", {}).get("anyres_patch_sampling", True)
    return config | {
        "hidden_size": hidden,
        "num_latents": latents,
        "num_hidden_layers": _num_layers(views, "vision_tokenizer.layers."),
        "num_attention_heads": max(1, inner // config["head_dim"]),
        "intermediate_size": shape_of(views, "vision_tokenizer.layers.0.1.1.weight")[0],
        "token_sampling": "patch" if sampling else "fixed",
        **_family_settings(views),
    }


def is_first_family(views: Views) -> bool:
    """Whether released tensors are of r-v1: a CLIP tower, or a resampler that reads the prompt."""
    return is_clip(views) or any(name.startswith("vision_tokenizer.text_projection.") for name in views)


def _family_settings(views: Views) -> dict:
    """Return what only the first family's resampler does: it reads padding, and in its instruct model the prompt."""
    if not is_first_family(views):
        return {}
    asks = "vision_tokenizer.text_projection.0.weight" in views
    return {"num_text_queries": TEXT_QUERIES if asks else 0, "hide_padding": False}


def _num_layers(views: Views, prefix: str) -> int:
    return len({match[1] for name in views if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))})


def text_config_of(source: dict, window_shift: int) -> dict:
    """Return our phi3 text_config: the source's values over Phi-3-mini's.

    Args:
        source: a text_config of the release, of Phi-3 or of ours, phi3 or mistral.
        window_shift: 1 for a release, whose window does not count the token itself; 0 for ours, which counts it.
    """
    config = template()["text_config"] | {"sliding_window": None}
    config |= {key: source[key] for key in config if key in source and key != "model_type"}
    if "num_attention_heads" in source and source.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = source["num_attention_heads"]
    if source.get("partial_rotary_factor", 1.0) != 1.0:
        config["partial_rotary_factor"] = source["partial_rotary_factor"]
    rope = source.get("rope_parameters") or {}  # what transformers 5.x writes
    config["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if config["sliding_window"] is not None:
        config["sliding_window"] += window_shift
    return config


def unfused_text_config(config: dict) -> dict:
    """Relabel a phi3 text_config as mistral, the same arithmetic with separate projections.

    Raises:
        ValueError: when the phi3 model uses something Mistral has not.
    """
    if config.get("rope_scaling") or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"text_config has rope_scaling {config.get('rope_scaling')!r}, which the mistral architecture does not "
            "compute as phi3 does. Only the 4k text model can be unfused: use --text-layout fused."
        )
    dropped = ("original_max_position_embeddings", "embd_pdrop", "resid_pdrop")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    kept = {key: value for key, value in config.items() if key not in dropped}
    return kept | {"model_type": "mistral", "head_dim": head_dim}


def tile_grids_of(pixel_grids: list | None, variant: str, tile_size: int) -> list[list[int]]:
    """Turn the release's grids, (width, height) in pixels, into ours, (rows, columns) in tiles, in the same order.

    Raises:
        ValueError: if a grid is no whole number of tiles of `tile_size` pixels.
    """
    if variant == "base":
        return []
    if not pixel_grids:
        return template()["tile_grids"]
    for width, height in pixel_grids:
        if width % tile_size or height % tile_size:
            raise ValueError(
                f"The source lists the grid {width} x {height} (width x height, pixels), which is no whole number of "
                f"tiles of {tile_size} pixels. The vision tower's image size is probably another one: correct "
                "image_size in the file given with --vision-config, or size in preprocessor_config.json."
            )
    return [[height // tile_size, width // tile_size] for width, height in pixel_grids]


# -- Whole files, from the released form to ours ----------------------------------------------------------------------


def read_released_config(path: Path, is_required: bool) -> dict:
    """Read a release's config.json; empty when there is none and none is required.

    Raises:
        FileNotFoundError: if it is required and not there.
        ValueError: if it belongs to another model.
    """
    if is_required and not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected the release's config.json, which gives initial_tokenizer_len. It was "
            "probably not downloaded: add it, or pass --source-config FILE."
        )
    config = read_sizes(path) if path.is_file() else {}
    text = config.get("text_config", {})
    if config and (config.get("model_type") not in MODEL_TYPES or text.get("model_type", "phi3") != "phi3"):
        raise ValueError(
            f"{path} has model_type {config.get('model_type')!r} with text model {text.get('model_type')!r}; expected "
            "'xgenmm' or 'blip_3' with 'phi3'. It probably belongs to another model: pass the right one with "
            "--source-config."
        )
    return config


def released_config(
    views: Views, source: dict, preprocessor: dict | None, given_vision: dict | None, variant: str
) -> tuple[dict, str]:
    """Say a released checkpoint's configuration in our words.

    Args:
        views: released names, before folding.
        source: the released config.json, or empty.
        preprocessor: the released preprocessor_config.json.
        given_vision: the tower's configuration, see `given_sizes`.
        variant: `auto`, `instruct` or `base`.

    Returns:
        our config.json with a phi3 text_config, and the variant, which is not `auto` any more.

    Raises:
        ValueError: if there is no config.json and the text model is not Phi-3-mini's size, or as the parts' functions.
    """
    size = (preprocessor or {}).get("size")
    image_size = size[0] if isinstance(size, list) else size.get("height") if isinstance(size, dict) else size
    image_size = image_size or source.get("vision_encoder_config", {}).get("force_image_size")
    vision = vision_config_of(views, given_vision, image_size)
    source_text = source.get("text_config", RELEASED_TEXT)
    text = text_config_of(source_text, window_shift=1)
    if not source and (width := shape_of(views, "lang_model.model.norm.weight")[0]) != text["hidden_size"]:
        raise ValueError(
            f"The text model has width {width} and no config.json beside it, so Phi-3-mini's width "
            f"{text['hidden_size']} was expected. It is probably another size: pass the checkpoint's original "
            "config.json with --source-config."
        )
    grids = (preprocessor or {}).get("grids") or source.get("vision_encoder_config", {}).get("anyres_grids")
    if is_first_family(views):
        variant = _first_family_variant(views, variant)
    elif variant == "auto":
        variant = "base" if preprocessor is not None and preprocessor.get("grids") is None else "instruct"
    num_ids = source_text.get("initial_tokenizer_len", RELEASED_TEXT["initial_tokenizer_len"])
    resampler = resampler_config_of(views, source)
    return join_config(vision, resampler, text, num_ids, grids, variant), variant


def _first_family_variant(views: Views, variant: str) -> str:
    """Return the variant that the tensors tell.

    Raises:
        ValueError: if another one is asked for.
    """
    found = "instruct" if "vision_tokenizer.text_projection.0.weight" in views else "base"
    if variant not in ("auto", found):
        raise ValueError(
            f"--variant {variant} was given, but of r-v1 the instruct model alone has text_projection, and these "
            f"{len(views)} tensors are those of {found}. It was probably meant for another checkpoint: leave it out."
        )
    return found


def join_config(
    vision: dict, resampler: dict, text: dict, num_ids: int, pixel_grids: list | None, variant: str
) -> dict:
    """Join the parts of our config.json; the image tokens get the ids after the first `num_ids`.

    Raises:
        ValueError: see `tile_grids_of`.
    """
    return template() | {
        "image_token_id": num_ids,
        "tile_grids": tile_grids_of(pixel_grids, variant, vision["image_size"]),
        "vision_config": vision,
        "resampler_config": resampler,
        "text_config": text | {"vocab_size": num_ids + len(IMAGE_TOKENS)},
    }


def preprocessor_config_of(source: dict | None, config: dict) -> dict:
    """Return our preprocessor_config.json: the source's mean and standard deviation, and the config's sizes."""
    side = config["vision_config"]["image_size"]
    values = dict(CLIP_STATISTICS) if config["vision_config"]["model_type"] == "clip_vision_model" else {}
    values |= {key: source[key] for key in ("image_mean", "image_std") if source and key in source}
    sizes = {"size": {"height": side, "width": side}, "tile_grids": config["tile_grids"]}
    return read_json(TEMPLATES / "preprocessor_config.json") | values | sizes


def scaling_of(preprocessor: dict) -> dict:
    """Return how a preprocessor_config.json scales pixels, for our config.json: the model scales bytes by that."""
    return {name: preprocessor[name] for name in ("rescale_factor", "image_mean", "image_std") if name in preprocessor}


def tower_statistics(folder: Path) -> dict | None:
    """Read the pixels' mean and standard deviation off a tower's folder, whichever library wrote it."""
    if found := optional_json(folder / "preprocessor_config.json"):
        return found
    open_clip = optional_json(folder / "open_clip_config.json") or {}
    timm = optional_json(folder / "config.json") or {}
    found = open_clip.get("preprocess_cfg") or timm.get("pretrained_cfg") or {}
    return {f"image_{key}": list(found[key]) for key in ("mean", "std") if key in found}


def own_preprocessor(folders: tuple[Path, ...], config: dict) -> dict:
    """Return preprocessor_config.json of the first folder of ours that has one.

    A processor saved by transformers 5.x puts it into processor_config.json, where 4.57 does not look for it.

    Args:
        folders: the source, and the folder it was trained from if that was given.
        config: our config.json, whose sizes hold.
    """
    ours = read_json(TEMPLATES / "preprocessor_config.json")
    for folder in folders:
        nested = (optional_json(folder / "processor_config.json") or {}).get("image_processor")
        if found := optional_json(folder / "preprocessor_config.json") or nested:
            side = config["vision_config"]["image_size"]
            sizes = {"size": {"height": side, "width": side}, "tile_grids": config["tile_grids"]}
            return found | {key: ours[key] for key in ("auto_map", "processor_class")} | sizes
    return preprocessor_config_of(None, config)


def complete_config(config: dict) -> tuple[dict, str]:
    """Write out what our config.json leaves unsaid: 4.57 leaves out values that equal the class's defaults.

    Returns:
        config.json with a phi3 text_config, and the text layout it had, `fused` or `unfused`.

    Raises:
        ValueError: if `Blip3Config` refuses it.
    """
    built = build_config(config)
    config = dict(config, tile_grids=built.tile_grids, image_token_id=built.image_token_id)
    config["text_config"] = text_config_of(built.text_config.to_dict() | config["text_config"], window_shift=0)
    for name, sub_config in (("vision_config", built.vision_config), ("resampler_config", built.resampler_config)):
        known = TIMM_KEYS if sub_config.model_type == "timm_wrapper" else template()[name]
        values = {key: value for key, value in sub_config.to_dict().items() if key in known}
        given = config[name] if known is not TIMM_KEYS else {}
        config[name] = values | given | {"model_type": sub_config.model_type}
    return config, "unfused" if built.text_config.model_type == "mistral" else "fused"


# -- Whole files, from our form to the released one -------------------------------------------------------------------


def original_configs(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[dict[str, dict], int]:
    """Return config, generation_config and preprocessor_config in the released form, and the number of dead rows."""
    ours, num_ids = checkpoint.config, checkpoint.config["image_token_id"]
    kept = {name: read_json(path) for name, path in checkpoint.small_files.items() if path.suffix == ".json"}
    config = kept.get("config.json") or _rebuilt_config(ours)
    vocab = config["text_config"].get("vocab_size", RELEASED_TEXT["vocab_size"])
    dead = checkpoint.unused.get(DEAD_ROWS + EMBEDDING)
    if dead is not None and num_ids + dead.shape[0] != vocab:
        config["text_config"]["vocab_size"] = vocab = num_ids + dead.shape[0]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    eos = checkpoint.generation.get("eos_token_id", ours["text_config"]["eos_token_id"])
    generation = {"_from_model_config": True, **checkpoint.generation}
    generation["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
    side = ours["vision_config"]["image_size"]
    preprocessor = {
        "auto_map": {"AutoImageProcessor": "image_processing_blip_3.Blip3ImageProcessor"},
        "do_resize": True,
        "grids": _pixel_grids(ours) or None,
        "image_mean": checkpoint.preprocessor["image_mean"],
        "image_processor_type": "Blip3ImageProcessor",
        "image_std": checkpoint.preprocessor["image_std"],
        "interpolation_mode": "bicubic",
        "resize_mode": "squash",
        "size": [side, side],
    }
    files = {
        "config.json": config,
        "generation_config.json": kept.get("generation_config.json", generation),
        "preprocessor_config.json": kept.get("preprocessor_config.json", preprocessor),
    }
    return files, vocab - num_ids


def _pixel_grids(config: dict) -> list[list[int]]:
    side = config["vision_config"]["image_size"]
    return [[columns * side, rows * side] for rows, columns in config["tile_grids"]]


def _rebuilt_config(ours: dict) -> dict:
    num_ids, text, resampler = ours["image_token_id"], dict(ours["text_config"]), ours["resampler_config"]
    is_released = num_ids == RELEASED_TEXT["initial_tokenizer_len"]
    vocab = RELEASED_TEXT["vocab_size"] if is_released else -(-num_ids // 64) * 64
    text |= {"initial_tokenizer_len": num_ids, "vocab_size": vocab}
    if text["sliding_window"] is not None:
        text["sliding_window"] -= 1
    is_first = ours["vision_config"]["model_type"] == "clip_vision_model"
    kind, code = ("blip_3", "modeling_blip_3.Blip3") if is_first else ("xgenmm", "modeling_xgenmm.XGenMM")
    vision: dict[str, Any] = {"model_type": f"{kind}_vision_encoder", "image_aspect_ratio": "anyres"}
    vision["anyres_patch_sampling"] = resampler["token_sampling"] == "patch"
    if is_first:
        vision |= {"model_name": "ViT-H-14-378-quickgelu", "force_image_size": ours["vision_config"]["image_size"]}
    elif ours["tile_grids"]:
        vision["anyres_grids"] = _pixel_grids(ours)
    return {
        "architectures": [f"{code.split('.')[1]}ModelForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": f"{code}Config",
            "AutoModelForVision2Seq": f"{code}ModelForConditionalGeneration",
        },
        "model_type": kind,
        "text_config": text,
        "vision_encoder_config": vision,
        "vision_tokenizer_config": {
            "model_type": f"{kind}_vision_tokenizer",
            "vis_feature_dim": resampler["hidden_size"],
            "lang_embedding_dim": text["hidden_size"],
            "num_vis_tokens": resampler["num_latents"],
        },
    }
