# SPDX-License-Identifier: Apache-2.0
"""Ask many images with Ray Data: a folder, parquet files or tars in, one line of JSON per image out.

    python -m blip3.serving.batch --model FOLDER --input IMAGES --output ANSWERS --question "What does the sign say?"

    plan: what is not answered yet --> read (tasks) --> batches --> answer (actors, each with a model) --+
                                                                                                         |
    ANSWERS/answers.jsonl, in the order of completion <-- append and fsync, by this process alone <------+
    ANSWERS/manifest.json, what the answers depend on

Each line is {"id", "question", "answer", "error"}. An image that cannot be read has the answer null and an error of
one sentence. The same command continues after any interruption: lines that are complete stay, the rest is asked.

Ids are paths inside the folder; in parquet the values of --id-column, or "file.parquet:row" without one; in tars
"file.tar:key". An image in parquet is bytes, a struct of bytes and path as `datasets` writes it, or a path beside the
parquet file. An image that kills its worker again and again is an error of its row, too. The work is a job
(`blip3/jobs`) of rows; here are what answers them, and the command.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoConfig, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..answering import DTYPES, IMAGE_TOKEN, Answerer, check_context, count_tokens, render_question
from ..checkpoints import CODE_FILES, GOLDEN_FILE, fingerprint, folder_of, locate
from ..jobs.inputs import Columns, one_sentence, plan_rows, read_image
from ..jobs.output import MANIFEST, Output
from ..jobs.ray_run import Summary, check_ray, line_table, run
from ..refusals import check_choice, check_positive

ENGINES = ("transformers", "vllm")
ANSWERS = "answers.jsonl"
_FORMER_FINGERPRINT_BYTES = 2**20  # at both ends of each file of the model


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """One run, as the command line gives it.

    Attributes:
        model: a checkpoint, as `checkpoints.locate` takes it.
        input: a folder of images, a parquet file, a tar of webdataset or a folder of either; folders are read with
            all that is below.
        output: a folder, made if need be.
        question: asked of each image whose row has none of its own.
        question_column: of parquet, or key of the .json in tars.
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
        check_choice("engine is", self.engine, ENGINES)
        check_choice("dtype is", self.dtype, DTYPES)
        for name in ("workers", "batch_size", "max_new_tokens"):
            check_positive(f"{name} is", getattr(self, name))
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

    @property
    def columns(self) -> Columns:
        """Of parquet."""
        values = {"question": self.question_column} if self.question_column else {}
        return Columns(self.image_column, self.id_column, values)


def run_batch(settings: BatchSettings) -> Summary:
    """Ask every image that has no line yet.

    Raises:
        ValueError: if model, input or output do not fit the settings.
        ImportError: if Ray or the engine is not installed.
        RuntimeError: if Ray lost rows.
    """
    start = time.perf_counter()
    _check_model(settings)
    in_workers = dataclasses.replace(settings, model=folder_of(settings.model))
    with open_output(settings) as answers:
        return run(
            plan_rows(settings.input, answers.done, settings.columns),
            answers,
            RowAnswerer,
            (in_workers,),
            workers=settings.workers,
            batch_size=settings.batch_size,
            num_gpus_per_worker=settings.num_gpus_per_worker,
            description="asking",
            start=start,
        )


def open_output(settings: BatchSettings) -> Output:
    """Open the answers so far.

    Raises:
        ValueError: if the folder is in use, holds answers to something else, or a line that is none.
    """
    names = ("question", "question_column", "image_column", "id_column", "engine", "max_new_tokens", "dtype")
    folder = folder_of(settings.model)
    compared = {name: getattr(settings, name) for name in names}
    compared |= {"input": str(settings.input.resolve()), "model": fingerprint(folder)}
    packages = ("torch", "transformers", "ray", *(["vllm"] if settings.engine == "vllm" else []))
    versions = {name: version(name) for name in packages if importlib.util.find_spec(name)}
    former = {"model": lambda: _former_fingerprint(folder)}
    made_with = {"model": str(folder), **versions}
    return Output(settings.output, ANSWERS, compared, made_with, former=former, what="answers")


class RowAnswerer:
    """A Ray actor: holds an engine and turns rows into lines.

    Args:
        settings: of the run.
        engine: for tests; made from the settings by default.
    """

    def __init__(self, settings: BatchSettings, engine: "Engine | None" = None):
        self.question = settings.question
        self.engine = engine or (VllmEngine if settings.engine == "vllm" else TransformersEngine)(settings)

    def __call__(self, batch: Any) -> Any:
        """Answer the rows that `inputs.read_unit` yields; returns a `line_table`."""
        pairs = [self._prepare(row) for row in batch.to_pylist()]
        lines, prepared = [line for line, _ in pairs], [inputs for line, inputs in pairs if line["error"] is None]
        answers = iter(self.engine.generate(prepared) if prepared else [])
        for line in lines:
            line["answer"] = next(answers) if line["error"] is None else None
        return line_table(lines, [line["error"] is not None for line in lines])

    def refuse(self, row: dict[str, Any], message: str) -> dict[str, Any]:
        """Give the line of a row that is not opened."""
        line = {"id": json.loads(row["id"]), "question": self._question_of(row), "answer": None}
        return {**line, "error": message}

    def _question_of(self, row: dict[str, Any]) -> Any:
        question = json.loads(row.get("question", "null"))
        return self.question if question is None else question

    def _prepare(self, row: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """Open one image; give its line, with what is wrong with it, and the engine's inputs."""
        question = self._question_of(row)
        prepared = error = None
        try:
            if not isinstance(question, str) or not question.strip():
                raise ValueError(f"The question is {question!r} but a text that is not blank is expected.")
            prepared = self.engine.prepare(read_image(row["kind"], row["image"]), question)
        except ValueError as problem:
            error = one_sentence(problem)
        return {"id": json.loads(row["id"]), "question": question, "answer": None, "error": error}, prepared


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
        device = "cuda" if settings.num_gpus_per_worker else "cpu"
        self.answerer = Answerer.load(settings.model, dtype=settings.dtype, device=device)

    def prepare(self, image: bytes, question: str) -> Any:
        """Return the model inputs of one row."""
        prompt = _render(self.answerer.processor, question)
        inputs = self.answerer.prepare([prompt], [[image]])
        self.answerer.check_context(inputs["input_ids"].shape[1], self.max_new_tokens)
        return inputs

    def generate(self, prepared: list) -> list[str]:
        """Answer all rows at once, or by halves where the memory does not suffice."""
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        return [answer.text for answer in self.answerer.generate_rows(prepared, **options)]


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
        prompt = _render(self.processor, question)
        opened = self.processor.image_processor.open_image(image)
        num_tokens = count_tokens(self.processor, prompt, [(opened.height, opened.width)])
        check_context(num_tokens, self.max_new_tokens, self.config)
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


def _render(processor: Any, question: str) -> str:
    """Write one image and its question as the model reads them.

    Raises:
        ValueError: if the question itself holds `<image>`.
    """
    if IMAGE_TOKEN in question:
        raise ValueError(f"The question holds {IMAGE_TOKEN}, which stands for the image and is written for it.")
    return render_question(processor, question, 1)


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
            "vLLM reads one folder. It is probably a checkpoint inside a repository, as base/: copy it and the "
            f"{len(CODE_FILES)} files *_blip3.py into one folder."
        )
    check_ray()
    if settings.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        _import_vllm()
    AutoProcessor.from_pretrained(**source)
    config = AutoConfig.from_pretrained(**source)
    get_class_from_dynamic_module(
        config.auto_map["AutoModelForImageTextToText"], source["pretrained_model_name_or_path"]
    )


def _former_fingerprint(folder: Path) -> str:
    """Tell two models apart as manifests of earlier versions do, by names, sizes and both ends of their files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_read = path.suffix in (".jinja", ".json", ".model", ".py", ".safetensors") and path.name != GOLDEN_FILE
        if not is_read or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FORMER_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FORMER_FINGERPRINT_BYTES))
            digest.update(file.read(_FORMER_FINGERPRINT_BYTES))
    return f"sha256:{digest.hexdigest()[:32]}"


# -- The command line -------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> BatchSettings:
    """Read the command line; usage errors exit with code 2."""
    parser = argparse.ArgumentParser(prog="python -m blip3.serving.batch", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a checkpoint folder, or owner/name")
    add("--input", type=Path, required=True, metavar="PATH", help="folder of images, or of parquet files or tars")
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
