# SPDX-License-Identifier: Apache-2.0
"""Options of `blip3 engines kale`, and the plan they describe."""

import argparse
import dataclasses
from importlib.metadata import version
from typing import Any

from ...checkpoints import fingerprint, folder_of
from ...refusals import check_positive, check_unread
from ..filters import add_caption_options
from ..stages import EnginePlan, StageSpec
from .prompts import CAPTION_PROMPT, FUSION_PROMPT
from .stages import ALT_TEXT, DENSE, FUSED, DenseCaption, Fuse, FuseAtOnce, TakeCaption
from .verify import DENSE_COLUMN, verify_scripted, verify_stages
from .writers import WriterOptions

ROLES = {
    "captioner": "writes the dense caption of an image",
    "rewriter": "fuses alt-text and dense caption",
    "distilled": "fuses image and alt-text at once, in place of the two others (KALE's second stage)",
}
OPTIONS_OF_ROLE = {"tokens": 256, "gpus": 0, "licence": "", "key_variable": ""}
OPTIONS_OF_SERVERS = {"concurrency": 8, "timeout": 120, "tries": 5, "writer_seed": 0}
OPTIONS_OF_PROCESS = {"writer_dtype": "auto", "writer_batch": 8}
"""Options that only some runs read, and their defaults."""
SCHEMA = {FUSED: "string", DENSE: "string", ALT_TEXT: "string"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the engine's own options."""
    _add_writer_options(parser)
    add_caption_options(parser)


def _add_writer_options(parser: argparse.ArgumentParser) -> None:
    for role, about in ROLES.items():
        group = parser.add_argument_group(role, f"A model that {about}: a name or folder, a url, or both.")
        add = group.add_argument
        add(f"--{role}", default="", metavar="MODEL", help="folder or owner/name; with a url the server's name for it")
        add(f"--{role}-url", default="", metavar="URL", help="of a server that speaks OpenAI's words, up to /v1")
        add(f"--{role}-key-variable", metavar="NAME", help="environment variable with the server's key")
        add(f"--{role}-tokens", type=int, metavar="N", help="most of one reply; default: %(default)s")
        add(f"--{role}-gpus", type=float, metavar="N", help="of one worker, without a url; default: 0")
        add(f"--{role}-licence", metavar="TEXT", help="of the model, for the manifest")
        parser.set_defaults(**{f"{role}_{name}": value for name, value in OPTIONS_OF_ROLE.items()})
    group = parser.add_argument_group("captions")
    add = group.add_argument
    add("--dense-column", metavar="NAME", help=f"of the shards, such as {DENSE}, in place of a captioner")
    add("--caption-prompt", default=CAPTION_PROMPT, metavar="TEXT", help="of the captioner; default: our own")
    add("--writer-dtype", metavar="TYPE", help="of models in this process; default: the checkpoint's")
    add("--writer-batch", type=int, metavar="N", help="requests at a time in this process; default: 8")
    add("--concurrency", type=int, metavar="N", help="requests to a server at a time and worker; default: 8")
    add("--timeout", type=float, metavar="SECONDS", help="of one try with a server; default: 120")
    add("--tries", type=int, metavar="N", help="of a request to a server; default: 5")
    add("--writer-seed", type=int, metavar="N", help="sent to servers; default: 0")
    parser.set_defaults(**OPTIONS_OF_SERVERS, **OPTIONS_OF_PROCESS)


def add_verify_options(parser: argparse.ArgumentParser) -> None:
    """Add what `verify` reads: the models, and which images are rendered."""
    _add_writer_options(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--verify-images", type=int, default=300, metavar="N", help="to render (default: 300)")
    group.add_argument("--verify-seed", type=int, default=0, metavar="N", help="of the rendered images (default: 0)")


def plan(options: argparse.Namespace) -> EnginePlan:
    """Describe the engine.

    Raises:
        FileNotFoundError: if a model is not there.
        ImportError: if a server is to be asked and httpx is not installed.
        RuntimeError: if a server does not say which model it has.
        ValueError: if the options leave a caption without a writer, or give it two.
    """
    _check_roles(options)
    _check_unread(options)
    writers = {role: _writer(options, role) for role in ROLES if _is_given(options, role)}
    stages = tuple(_stages(options, writers))
    asked = {"captioner": options.caption_prompt, "rewriter": FUSION_PROMPT}
    settings: dict[str, Any] = {"dense_column": options.dense_column}
    for role in ROLES:
        settings[role] = _rows_depend_on(writers[role]) | {"prompt": asked.get(role)} if role in writers else None
    return EnginePlan("kale", stages, SCHEMA, settings, _made_with(options, writers))


def verify(options: argparse.Namespace) -> dict[str, float]:
    """Fuse alt-texts of rendered images; figures as `verify.verify_stages` names, by a script if no model is named.

    Raises:
        ValueError: for options that do not fit each other; else as `plan`.
    """
    check_positive("--verify-images is", options.verify_images)
    given = (options.verify_images, options.verify_seed)
    if not any(_is_given(options, role) for role in ROLES):
        check_unread(vars(options), {"dense_column": None}, "no --rewriter is given, and the script needs no column")
        _check_unread(options)
        return verify_scripted(*given)
    return verify_stages(plan(options).stages, *given, dense_column=options.dense_column or DENSE_COLUMN)


def _is_given(options: argparse.Namespace, role: str) -> bool:
    return bool(getattr(options, role) or getattr(options, f"{role}_url"))


def _check_roles(options: argparse.Namespace) -> None:
    given = [role for role in ROLES if _is_given(options, role)]
    column = ["dense column"] if options.dense_column else []
    fits = given == ["distilled"] and not column
    fits |= given == ["captioner", "rewriter"] and not column
    fits |= given == ["rewriter"] and bool(column)
    if not fits:
        raise ValueError(
            f"The options name {', '.join([*given, *column]) or 'no model'}, but a caption needs a captioner and a "
            "rewriter, a --dense-column and a rewriter, or a distilled model alone. One was probably left out or is "
            "too many: name a model by its folder or by its server's url."
        )


def _check_unread(options: argparse.Namespace) -> None:
    """Refuse options of a role that nobody has, of servers where there is none, and of models where all are served."""
    given = [role for role in ROLES if _is_given(options, role)]
    served = [role for role in given if getattr(options, f"{role}_url")]
    for role in ROLES:
        if role not in given:
            _check_role(options, role, list(OPTIONS_OF_ROLE), f"there is no --{role}")
        elif role in served:
            _check_role(options, role, ["gpus"], f"the {role} is a server's")
        else:
            _check_role(options, role, ["key_variable"], f"there is no --{role}-url")
    if "captioner" not in given:
        check_unread(vars(options), {"caption_prompt": CAPTION_PROMPT}, "there is no --captioner")
    if not served:
        check_unread(vars(options), OPTIONS_OF_SERVERS, "no model is a server's")
    if len(served) == len(given):
        check_unread(vars(options), OPTIONS_OF_PROCESS, "no model runs in this process")


def _check_role(options: argparse.Namespace, role: str, names: list[str], reason: str) -> None:
    check_unread(vars(options), {f"{role}_{name}": OPTIONS_OF_ROLE[name] for name in names}, reason)


def _writer(options: argparse.Namespace, role: str) -> WriterOptions:
    """Describe the writer of a role, with the name of its model."""
    num_gpus = getattr(options, f"{role}_gpus")
    writer = WriterOptions(
        model=getattr(options, role),
        url=getattr(options, f"{role}_url"),
        max_new_tokens=getattr(options, f"{role}_tokens"),
        seed=options.writer_seed,
        dtype=options.writer_dtype,
        device="cuda" if num_gpus else "cpu",
        batch_size=options.writer_batch,
        concurrency=options.concurrency,
        timeout=options.timeout,
        tries=options.tries,
        key_variable=getattr(options, f"{role}_key_variable"),
    )
    if writer.url:
        from .server import served_model

        return dataclasses.replace(writer, model=served_model(writer))
    return dataclasses.replace(writer, model=str(folder_of(writer.model)))


def _stages(options: argparse.Namespace, writers: dict[str, WriterOptions]) -> list[StageSpec]:
    if "distilled" in writers:
        return [_spec(options, "distilled", writers, FuseAtOnce)]
    if options.dense_column:
        first = StageSpec(TakeCaption, {"column": options.dense_column})
    else:
        first = _spec(options, "captioner", writers, DenseCaption, prompt=options.caption_prompt)
    return [first, _spec(options, "rewriter", writers, Fuse)]


def _spec(
    options: argparse.Namespace, role: str, writers: dict[str, WriterOptions], stage: Any, **further: Any
) -> StageSpec:
    num_gpus = 0 if writers[role].url else getattr(options, f"{role}_gpus")
    return StageSpec(stage, {"writer": dataclasses.asdict(writers[role]), **further}, num_gpus=num_gpus)


def _rows_depend_on(writer: WriterOptions) -> dict[str, Any]:
    """Give what of a writer changes its replies: a run may be continued with another time-out, not another model."""
    values: dict[str, Any] = {"max_new_tokens": writer.max_new_tokens}
    if writer.url:
        return values | {"model": writer.model, "seed": writer.seed}
    return values | {"model": fingerprint(folder_of(writer.model)), "dtype": writer.dtype}


def _made_with(options: argparse.Namespace, writers: dict[str, WriterOptions]) -> dict[str, Any]:
    made: dict[str, Any] = {name: version(name) for name in ("torch", "transformers")}
    for role, writer in writers.items():
        licence = getattr(options, f"{role}_licence") or "not given"
        made[role] = {"model": writer.model, "licence": licence} | ({"url": writer.url} if writer.url else {})
    return made
