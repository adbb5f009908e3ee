# SPDX-License-Identifier: Apache-2.0
"""Ask many images with Ray Data: a folder or parquet files in, one line of JSON per image out.

    python -m blip3.serving.batch --model FOLDER --input PICTURES --output ANSWERS --question "What does the sign say?"

    plan: what is not answered yet --> read (tasks) --> batches --> answer (actors, each with a model) --+
                                                                                                         |
    ANSWERS/answers.jsonl, in the order of completion <-- append and fsync, by this process alone <------+
    ANSWERS/manifest.json, what the answers depend on

Each line is {"id", "question", "answer", "error"}. An image that cannot be read has the answer null and an error of
one sentence. The same command continues after any interruption: lines that are complete stay, the rest is asked.

ids are paths inside the folder; in parquet the values of --id-column, or "file.parquet:row" without one. An image in
parquet is bytes, a struct of bytes and path as `datasets` writes it, or a path beside the parquet file.
"""

import argparse
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..checkpoints import CODE_FILES, GOLDEN_FILE, folder_of, locate

ENGINES = ("transformers", "vllm")
DTYPES = ("auto", "bfloat16", "float16", "float32")
IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".jfif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
IMAGE_TOKEN = "<image>"
ANSWERS, MANIFEST = "answers.jsonl", "manifest.json"
MAX_IMAGE_BYTES = 256 * 2**20  # of one file; larger ones are errors, so that a mistake cannot fill the memory
MAX_BLOCK_BYTES = 8 * 2**20  # of images on their way between two of Ray's processes
PATHS_PER_UNIT = 1024
FINGERPRINT_BYTES = 2**20  # at both ends of each file of the model


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """One run, as the command line gives it.

    Attributes:
        model: a checkpoint, as `checkpoints.locate` takes it.
        input: a folder of images, a parquet file or a folder of them; folders are read with all that is below.
        output: a folder, made if need be.
        question: asked of each image whose row has none of its own.
        question_column: of parquet.
        image_column: of parquet.
        id_column: of parquet; None takes `id` if there is one. Integers or texts, each once.
        engine: `transformers` or `vllm`.
        workers: actors, each with a model of its own.
        batch_size: images per call of the engine.
        max_new_tokens: of one answer.
        dtype: `auto` takes the checkpoint's.
        num_gpus_per_worker: 0 stays on the CPU; a fraction shares one; above 1 is vLLM's tensor parallelism.

    Raises:
        ValueError: if a value cannot work.
    """

    model: Path
    input: Path
    output: Path
    question: str | None = None
    question_column: str | None = None
    image_column: str = "image"
    id_column: str | None = None
    engine: str = "transformers"
    workers: int = 2
    batch_size: int = 8
    max_new_tokens: int = 64
    dtype: str = "auto"
    num_gpus_per_worker: float = 0

    def __post_init__(self) -> None:
        for name, choices in (("engine", ENGINES), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} but must be one of {', '.join(choices)}. It is probably "
                    "misspelt: choose one of them."
                )
        for name in ("workers", "batch_size", "max_new_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} but must be a positive integer. It was probably meant to "
                    "mean 'as many as possible': write a number, 1 or more."
                )
        if not (self.question or "").strip() and self.question_column is None:
            raise ValueError(
                f"question is {self.question!r} and no question_column is given, but each image needs a question. "
                "It was probably left out: pass one of the two."
            )
        num_gpus, whole = self.num_gpus_per_worker, self.engine == "vllm"
        if num_gpus < 0 or (num_gpus > 1 and (not whole or num_gpus != int(num_gpus))):
            raise ValueError(
                f"num_gpus_per_worker is {num_gpus:g} with the engine {self.engine}, which takes 0 to 1"
                f"{', or a whole number' if whole else ''}. It was probably meant for the whole machine: raise "
                "workers instead, or let vLLM split the model."
            )


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        rows: of the input.
        done: answered or reported by this run.
        errors: of these, reported.
        earlier: rows that were done before.
        skipped_files: files of the folder that are no images by their name.
        seconds: from loading to the last line.
        answers: where the lines are.
    """

    rows: int
    done: int
    errors: int
    earlier: int
    skipped_files: int
    seconds: float
    answers: Path

    def __str__(self) -> str:
        skipped = f"; {self.skipped_files} files are no images by their name" if self.skipped_files else ""
        return (
            f"Done: {self.done} of {self.rows} rows, {self.errors} of them errors, {self.earlier} done earlier"
            f"{skipped}; {self.seconds:.1f} s, {self.done / self.seconds:.2f} rows/s: {self.answers}"
        )


def run_batch(settings: BatchSettings) -> Summary:
    """Ask every image that has no line yet.

    Uses Ray as it is if it was started, else the cluster of RAY_ADDRESS, else this machine for as long as it takes.

    Raises:
        ValueError: if model, input or output do not fit the settings.
        RuntimeError: if Ray lost rows.
    """
    start = time.perf_counter()
    _check_model(settings)
    with AnswerFile(settings) as answers:
        plan = make_plan(settings, answers.done)
        num_earlier, num_errors = plan.num_rows - plan.num_missing, 0
        written: set[str] = set()
        with tqdm(desc="starting", total=plan.num_rows, initial=num_earlier, unit="row") as progress:
            for rows in _stream(settings, plan) if plan.num_missing else ():
                rows = [row for row in rows if row["id"] not in written]  # a worker that died may repeat some
                answers.append([row["line"] for row in rows])
                written.update(row["id"] for row in rows)
                num_errors += sum(row["is_error"] for row in rows)
                progress.set_description("asking", refresh=False)
                progress.set_postfix(errors=num_errors, refresh=False)
                progress.update(len(rows))
        if len(written) != plan.num_missing:
            raise RuntimeError(
                f"Ray returned {len(written)} rows but {plan.num_missing} were planned. The input probably changed "
                "meanwhile: run the same command again, it asks what is missing."
            )
        seconds = time.perf_counter() - start
        counts = (plan.num_rows, len(written), num_errors, num_earlier, plan.num_skipped_files)
        return Summary(*counts, seconds, answers.path)


# -- The pipeline -----------------------------------------------------------------------------------------------------


def _stream(settings: BatchSettings, plan: "Plan") -> Iterator[list[dict]]:
    """Run the plan on Ray and yield finished rows, a batch at a time and in the order of completion."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = MAX_BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    is_ours = not ray.is_initialized()
    cpus_per_worker = start_ray(settings.workers) if is_ours else 1
    try:
        units = ray.data.from_items([{"unit": json.dumps(unit)} for unit in plan.units])
        rows = units.map_batches(functools.partial(_read_units, batch_size=settings.batch_size), batch_size=1)
        answered = rows.repartition(target_num_rows_per_block=settings.batch_size).map_batches(
            Answerer,
            fn_constructor_args=(dataclasses.replace(settings, model=folder_of(settings.model)),),
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=settings.workers),
            num_cpus=cpus_per_worker,
            num_gpus=settings.num_gpus_per_worker,
        )
        for table in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield table.to_pylist()
    finally:
        if is_ours:
            ray.shutdown()


def start_ray(workers: int) -> int:
    """Connect to the cluster of RAY_ADDRESS, or start Ray on this machine.

    Ray's processes listen on every address of the machine; since Ray 2.59 they answer only who knows the user's token.

    Returns:
        How many CPU cores each worker should ask for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return 1
    cpus_per_worker = max(1, (os.cpu_count() or 1) // workers)
    num_cpus = cpus_per_worker * workers + 2  # reading and cutting into batches must never wait for a worker to end
    ray.init(num_cpus=num_cpus, _node_ip_address="127.0.0.1", include_dashboard=False, **quiet)
    return cpus_per_worker


class Answerer:
    """A Ray actor: holds an engine and turns rows into lines.

    Args:
        settings: of the run.
        engine: for tests; made from the settings by default.
    """

    def __init__(self, settings: BatchSettings, engine: "Engine | None" = None):
        self.question = settings.question
        self.engine = engine or (VllmEngine if settings.engine == "vllm" else TransformersEngine)(settings)

    def __call__(self, batch: Any) -> Any:
        """Answer the rows `read_unit` yields; returns their id, line and whether it reports an error."""
        import pyarrow

        rows = [self._prepare(row) for row in batch.to_pylist()]
        good = [row for row in rows if row["error"] is None]
        answers = self.engine.generate([row["prepared"] for row in good]) if good else []
        for row, answer in zip(good, answers, strict=True):
            row["answer"] = answer
        return pyarrow.table(
            {
                "id": [row["id"] for row in rows],
                "line": [_to_line(row) for row in rows],
                "is_error": [row["error"] is not None for row in rows],
            }
        )

    def _prepare(self, row: dict) -> dict:
        """Open one image; what is wrong with it becomes the row's error."""
        question = json.loads(row["question"])
        if question is None:
            question = self.question
        prepared = error = None
        try:
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"The question is {question!r} but a text that is not blank is expected.")
            prepared = self.engine.prepare(_read_image(row["kind"], row["picture"]), question)
        except ValueError as problem:
            error = _one_sentence(problem)
        return {"id": row["id"], "question": question, "answer": None, "error": error, "prepared": prepared}


def _read_image(kind: str, data: bytes) -> bytes:
    """Return the bytes of an image's file.

    Raises:
        ValueError: if there are none, or too many.
    """
    if kind == "none":
        raise ValueError("The row has no image.")
    num_bytes = len(data)
    if kind == "path":
        path = Path(os.fsdecode(data))
        try:
            num_bytes = path.stat().st_size
            data = path.read_bytes() if num_bytes <= MAX_IMAGE_BYTES else b""
        except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
            reason = "no such file" if isinstance(error, FileNotFoundError) else type(error).__name__
            raise ValueError(f"The file {path.name!r} could not be read ({reason}).") from None
    if num_bytes > MAX_IMAGE_BYTES:
        raise ValueError(f"The image has {num_bytes} bytes but at most {MAX_IMAGE_BYTES} are read.")
    return data


def _one_sentence(error: ValueError) -> str:
    """Cut a message of several sentences after the first, without what differs from run to run."""
    text = " ".join(str(error).removeprefix("Image 1 of 1: ").split())
    text = re.sub(r" <_io\.BytesIO[^>]*>", "", text)
    text = re.split(r"(?<=\.) ", text, maxsplit=1)[0].removesuffix(".")
    return text[:1].upper() + text[1:300] + "."


def _to_line(row: Mapping) -> str:
    """Write one line of the output; ASCII only where a file's name is no text."""
    values = {name: row[name] for name in ("question", "answer", "error")}
    line = json.dumps({"id": json.loads(row["id"]), **values}, ensure_ascii=False)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(line))
    return line


# -- Engines ----------------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """What answers."""

    def prepare(self, image: bytes, question: str) -> Any:
        """Open and check one image; raises ValueError if it or the question cannot be used."""

    def generate(self, prepared: list) -> list[str]:
        """Answer what `prepare` returned, greedily."""


class TransformersEngine:
    """The model in this process, on the GPU Ray gives it or on the CPU.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: BatchSettings):
        self.max_new_tokens = settings.max_new_tokens
        source = locate(settings.model)
        self.processor = AutoProcessor.from_pretrained(**source)
        model = AutoModelForImageTextToText.from_pretrained(**source, dtype=settings.dtype)
        device = "cuda" if settings.num_gpus_per_worker else "cpu"
        if model.device.type != device:  # a quantized model is there already, and refuses to be moved
            model = model.to(device)
        self.model = model.eval()

    def prepare(self, image: bytes, question: str) -> Any:
        """Return the model inputs of one row."""
        prompt = render(self.processor, question)
        inputs = self.processor(text=[prompt], images=[[image]], return_tensors="pt")
        check_length(inputs["input_ids"].shape[1], self.max_new_tokens, self.model.config)
        return inputs

    def generate(self, prepared: list) -> list[str]:
        """Answer all rows at once, or by halves where the memory does not suffice."""
        try:
            return self._generate(prepared)
        except torch.OutOfMemoryError:
            if len(prepared) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(prepared) // 2
        return self.generate(prepared[:half]) + self.generate(prepared[half:])

    @torch.inference_mode()
    def _generate(self, prepared: list) -> list[str]:
        text = [
            {name: row[name][0].tolist() for name in ("input_ids", "attention_mask")} for row in prepared
        ]  # each row was prepared alone, so that one bad image spoils no batch
        inputs = self.processor.tokenizer.pad(text, padding_side="left", return_tensors="pt")
        for name in ("pixel_values", "image_sizes"):
            inputs[name] = torch.cat([row[name] for row in prepared])
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        answers = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


class VllmEngine:
    """A vLLM engine in this process.

    Args:
        settings: of the run.

    Raises:
        ImportError: if vLLM is not installed.
    """

    def __init__(self, settings: BatchSettings):
        vllm = _import_vllm()
        self.max_new_tokens = settings.max_new_tokens
        source = locate(settings.model)
        self.processor = AutoProcessor.from_pretrained(**source)
        self.config = AutoConfig.from_pretrained(**source)
        self.sampling = vllm.SamplingParams(temperature=0, max_tokens=settings.max_new_tokens)
        self.llm = vllm.LLM(
            model=str(folder_of(settings.model)),
            trust_remote_code=True,
            dtype=settings.dtype,
            limit_mm_per_prompt={"image": 1},
            tensor_parallel_size=max(1, int(settings.num_gpus_per_worker)),
        )

    def prepare(self, image: bytes, question: str) -> Any:
        """Return one request: the prompt as the chat template writes it, and the decoded image."""
        prompt = render(self.processor, question)
        opened = self.processor.image_processor.open_image(image)
        num_image_tokens = self.processor._get_num_multimodal_tokens([(opened.height, opened.width)]).num_image_tokens
        num_tokens = len(self.processor.tokenizer(prompt)["input_ids"]) - 1 + num_image_tokens[0]
        check_length(num_tokens, self.max_new_tokens, self.config)
        return {"prompt": prompt, "multi_modal_data": {"image": opened}}

    def generate(self, prepared: list) -> list[str]:
        """Answer all requests; vLLM schedules them."""
        outputs = self.llm.generate(prepared, self.sampling, use_tqdm=False)
        return [output.outputs[0].text.strip() for output in outputs]


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            f"The engine vllm was asked for but vllm cannot be imported ({error}). It is probably not installed: "
            "pip install vllm, or use the engine transformers."
        ) from error
    return vllm


def render(processor: Any, question: str) -> str:
    """Write one image and its question as the model reads them; base checkpoints just continue the text.

    Raises:
        ValueError: if the question itself holds `<image>`.
    """
    if IMAGE_TOKEN in question:
        raise ValueError(f"The question holds {IMAGE_TOKEN}, which stands for the image and is written for it.")
    if not processor.chat_template:
        return IMAGE_TOKEN + question
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_length(num_tokens: int, max_new_tokens: int, config: Any) -> None:
    """Refuse a prompt whose answer would not fit behind it.

    Raises:
        ValueError: with the numbers.
    """
    context = config.text_config.max_position_embeddings
    if num_tokens + max_new_tokens > context:
        raise ValueError(
            f"The prompt takes {num_tokens} tokens its answer up to {max_new_tokens}, but the model reads {context}."
        )


def _check_model(settings: BatchSettings) -> None:
    """Load what is small of the model, so that a wrong folder fails before Ray starts.

    It also puts the folder's code where transformers imports it from, which two workers must not do at once.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if vLLM cannot read it.
        ImportError: if Ray or the engine is not installed.
    """
    source = locate(settings.model)
    if settings.engine == "vllm" and source["subfolder"]:
        raise ValueError(
            f"The model {str(settings.model)!r} takes its code from {source['pretrained_model_name_or_path']}, but "
            "vLLM reads one folder. It is probably a checkpoint inside a repository, as mini/: copy it and the "
            f"{len(CODE_FILES)} files *_blip3.py into one folder."
        )
    if importlib.util.find_spec("ray") is None:
        raise ImportError(
            "Batches run on ray, which is not installed, but its data part is needed. The extra was probably left "
            'out: pip install "ray[data]".'
        )
    if settings.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        _import_vllm()
    AutoProcessor.from_pretrained(**source)
    config = AutoConfig.from_pretrained(**source)
    get_class_from_dynamic_module(
        config.auto_map["AutoModelForImageTextToText"], source["pretrained_model_name_or_path"]
    )


# -- The input --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """What to read: units that one task reads each, written so that they travel as JSON.

    Attributes:
        units: {"folder", "paths"} of a folder, {"file", "name", "group", "first_row", "offsets", ...} of parquet.
        num_rows: of the whole input.
        num_missing: rows the units hold.
        num_skipped_files: files that are no images by their name.
    """

    units: list[dict]
    num_rows: int = 0
    num_missing: int = 0
    num_skipped_files: int = 0


def make_plan(settings: BatchSettings, done: set[str]) -> Plan:
    """Find the rows of the input that are not done, without opening an image.

    Args:
        settings: of the run.
        done: their ids as JSON.

    Raises:
        ValueError: if the input holds no rows or does not fit the settings.
    """
    if not settings.input.exists():
        raise ValueError(
            f"The input {str(settings.input)!r} does not exist (no such file or folder), but a folder of images or "
            "parquet files, or one parquet file, is expected. It is probably misspelt or relative to another folder: "
            "correct it, or pass the whole path."
        )
    files = sorted(_walk(settings.input)) if settings.input.is_dir() else [settings.input]
    parquet = [path for path in files if path.suffix.lower() == ".parquet"]
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if bool(parquet) == bool(images):
        raise ValueError(
            f"The input {str(settings.input)!r} holds {len(images)} images and {len(parquet)} parquet files, but "
            "a folder with one of the two is expected, or a parquet file. It is probably misspelt or a folder too "
            "high: name the folder or file itself."
        )
    if parquet:
        return _plan_parquet(settings, parquet, done)
    if settings.question_column or not settings.input.is_dir():
        raise ValueError(
            f"The input {str(settings.input)!r} is a {'folder' if settings.input.is_dir() else 'file'} of images, "
            "but a folder without a question_column, or parquet, is expected. The input was probably meant to be "
            "parquet: name it, or pass the folder and one question."
        )
    names = [path.relative_to(settings.input).as_posix() for path in images]
    missing = [name for name in names if json.dumps(name) not in done]
    starts = range(0, len(missing), PATHS_PER_UNIT)
    folder = str(settings.input.resolve())
    units = [{"folder": folder, "paths": missing[start : start + PATHS_PER_UNIT]} for start in starts]
    return Plan(units, len(names), len(missing), len(files) - len(names))


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, hidden ones and linked folders left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _plan_parquet(settings: BatchSettings, files: list[Path], done: set[str]) -> Plan:
    import pyarrow.parquet

    plan, seen = Plan([]), set()
    for path in files:
        file = pyarrow.parquet.ParquetFile(path)
        columns = _check_columns(settings, file.schema_arrow.names, path)
        name = path.name if path == settings.input else path.relative_to(settings.input).as_posix()
        first_row = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            unit = {"file": str(path.resolve()), "name": name, "group": group, "first_row": first_row, **columns}
            values = _column(file, group, columns["id_column"]) if columns["id_column"] else None
            ids = [_id_of(unit, offset, values[offset] if values else None) for offset in range(num_rows)]
            if values:
                _check_ids(ids, values, seen, path)
            offsets = [offset for offset, row_id in enumerate(ids) if row_id not in done]
            if offsets:
                plan.units.append({**unit, "offsets": offsets if len(offsets) < num_rows else None})
            plan.num_missing += len(offsets)
            first_row += num_rows
        plan.num_rows += first_row
    return plan


def _check_columns(settings: BatchSettings, names: list[str], path: Path) -> dict[str, str | None]:
    """Return the columns to read from one parquet file."""
    id_column = settings.id_column or ("id" if "id" in names else None)
    columns = {"image_column": settings.image_column, "id_column": id_column}
    columns["question_column"] = settings.question_column
    for option, column in columns.items():
        if column is not None and column not in names:
            raise ValueError(
                f"{path.name} has the columns {', '.join(names)} but {option} is {column!r}. It is probably named "
                "otherwise: pass one of its columns."
            )
    return columns


def _column(file: Any, group: int, column: str) -> list:
    return file.read_row_group(group, columns=[column]).column(0).to_pylist()


def _id_of(unit: dict, offset: int, value: Any) -> str:
    """The id of one row as JSON."""
    if unit["id_column"] is None:
        value = f"{unit['name']}:{unit['first_row'] + offset}"
    return json.dumps(value if isinstance(value, int | str) else str(value))


def _check_ids(ids: list[str], values: list, seen: set[str], path: Path) -> None:
    """Refuse ids that do not name one row each: an interrupted run could not tell what is missing."""
    for row_id, value in zip(ids, values, strict=True):
        if row_id in seen or not isinstance(value, int | str):
            what = "for the second time" if row_id in seen else f"of the type {type(value).__name__}"
            raise ValueError(
                f"{path.name} has the id {value!r} {what}, but ids are integers or texts and each names one row. The "
                "column probably names images, several rows each: pass another id_column, or write one."
            )
        seen.add(row_id)


def _read_units(batch: Mapping[str, Iterable[str]], batch_size: int) -> Iterator[Any]:
    for unit in batch["unit"]:
        yield from read_unit(json.loads(unit), batch_size)


def read_unit(unit: dict, batch_size: int) -> Iterator[Any]:
    """Yield tables of at most `batch_size` rows: id and question as JSON, the image's bytes or path.

    Image files are opened where they are answered; only what lies inside parquet is read here.
    """
    import pyarrow
    import pyarrow.parquet

    if "paths" in unit:
        for start in range(0, len(unit["paths"]), batch_size):
            names = unit["paths"][start : start + batch_size]
            yield _to_table(
                [(json.dumps(name), "path", os.fsencode(Path(unit["folder"], name)), None) for name in names]
            )
        return
    columns = [unit["image_column"], unit["question_column"], unit["id_column"]]
    columns = list(dict.fromkeys(column for column in columns if column is not None))
    offsets = None if unit["offsets"] is None else set(unit["offsets"])
    file = pyarrow.parquet.ParquetFile(unit["file"])
    start = 0
    for batch in file.iter_batches(batch_size=batch_size, row_groups=[unit["group"]], columns=columns):
        kept = [index for index in range(len(batch)) if offsets is None or start + index in offsets]
        rows = batch.take(pyarrow.array(kept, pyarrow.int64())).to_pylist()
        if rows:
            yield _to_table([_parquet_row(unit, start + index, row) for index, row in zip(kept, rows, strict=True)])
        start += len(batch)


def _parquet_row(unit: dict, offset: int, row: Mapping) -> tuple[str, str, bytes, Any]:
    question = row[unit["question_column"]] if unit["question_column"] else None
    row_id = _id_of(unit, offset, row[unit["id_column"]] if unit["id_column"] else None)
    image = row[unit["image_column"]]
    if isinstance(image, Mapping):  # as datasets writes it
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        return row_id, "path", os.fsencode(Path(unit["file"]).parent / image), question
    return (row_id, "bytes", image, question) if isinstance(image, bytes) else (row_id, "none", b"", question)


def _to_table(rows: list[tuple[str, str, bytes, Any]]) -> Any:
    import pyarrow

    ids, kinds, images, questions = zip(*rows, strict=True)
    questions = [json.dumps(question, default=str) for question in questions]
    columns = {"id": ids, "kind": kinds, "picture": pyarrow.array(images, pyarrow.large_binary())}
    return pyarrow.table({**columns, "question": questions})


# -- The output -------------------------------------------------------------------------------------------------------


class AnswerFile:
    """The lines of a run and of the runs before it; one process at a time, the only one that writes.

    Args:
        settings: of the run.

    Raises:
        ValueError: if the folder is in use, holds answers to something else, or a line that is none.
    """

    def __init__(self, settings: BatchSettings):
        settings.output.mkdir(parents=True, exist_ok=True)
        self.path = settings.output / ANSWERS
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._check_manifest(settings)
            self.done = self._read_done()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, lines: list[str]) -> None:
        """Write lines and wait until they are on the disk."""
        self._file.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it however we end
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is being written by another process, but one run at a time may write it. The same "
                "command is probably still running: wait for it, or name another output."
            ) from None

    def _check_manifest(self, settings: BatchSettings) -> None:
        """Write the manifest beside the first answers, or compare it with that of answers already there."""
        path, ours = settings.output / MANIFEST, _manifest(settings)
        if not path.is_file():
            if self.path.stat().st_size:
                raise ValueError(
                    f"{self.path} holds answers but there is no {MANIFEST} to say of what. It was probably copied or "
                    "deleted: bring it back, or name another output."
                )
            return _write_whole(path, json.dumps(ours, indent=2) + "\n")
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} is not as a run writes it. It was probably edited: bring it back, or name another output."
            ) from None
        for name, value in ours["settings"].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"{settings.output} holds answers with {name} {theirs.get(name)!r} but this run has {value!r}. "
                    "Answers of two kinds would be mixed: repeat the first command to continue it, or name another "
                    "output."
                )

    def _read_done(self) -> set[str]:
        """Return the ids of complete lines, and cut off a line that an interruption left half written."""
        self._file.seek(0)
        done, end = set(), 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.dumps(json.loads(line)["id"]))
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"Line {number} of {self.path} is {line[:40]!r} but an object with an id is expected. It was "
                    "probably edited or damaged: remove the line, its row is then asked again."
                ) from None
            end += len(line)
        self._file.truncate(end)
        return done


def _manifest(settings: BatchSettings) -> dict:
    """What answers depend on, and for the reader what else they were made with."""
    names = ("question", "question_column", "image_column", "id_column", "engine", "max_new_tokens", "dtype")
    compared = {name: getattr(settings, name) for name in names}
    compared |= {"input": str(settings.input.resolve()), "model": fingerprint(folder_of(settings.model))}
    packages = ("torch", "transformers", "ray", *(["vllm"] if settings.engine == "vllm" else []))
    versions = {name: version(name) for name in packages if importlib.util.find_spec(name)}
    return {"settings": compared, "made_with": {"model": str(folder_of(settings.model)), **versions}}


def fingerprint(folder: Path) -> str:
    """Tell two models apart by the names, sizes and both ends of their files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_read = path.suffix in (".jinja", ".json", ".model", ".py", ".safetensors") and path.name != GOLDEN_FILE
        if not is_read or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return f"sha256:{digest.hexdigest()[:32]}"


def _write_whole(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


# -- The command line -------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> BatchSettings:
    """Read the command line; usage errors exit with code 2."""
    parser = argparse.ArgumentParser(prog="python -m blip3.serving.batch", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint folder, or owner/name")
    add("--input", type=Path, required=True, metavar="PATH", help="folder of images, parquet file or folder of them")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help=f"for {ANSWERS} and {MANIFEST}; continued if there",
    )
    add("--question", help="for every image whose row has none; default: none")
    add("--question-column", metavar="NAME", help="of parquet; default: none")
    add("--image-column", metavar="NAME", default="image", help="of parquet; default: %(default)s")
    add("--id-column", metavar="NAME", help="of parquet; default: id if there is one, else file and row")
    add("--engine", choices=ENGINES, default="transformers", help="default: %(default)s")
    add("--workers", type=int, default=2, help="processes with a model each; default: %(default)s")
    add("--batch-size", type=int, default=8, help="images at once; default: %(default)s")
    add("--max-new-tokens", type=int, default=64, help="of one answer; default: %(default)s")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's; default: %(default)s")
    add("--num-gpus-per-worker", type=float, default=0, help="0: CPU; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        return BatchSettings(**vars(args))
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None) -> int:
    """Run; return 0 (also with images reported as errors), 1 after printing an error, or 130 when interrupted."""
    settings = parse_args(argv)
    try:
        print(run_batch(settings))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: the same command continues.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
