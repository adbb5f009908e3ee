# SPDX-License-Identifier: Apache-2.0
r"""`lmms-eval --model blip3`: vision-language models of transformers, with images where the prompt has them.

    lmms-eval --model blip3 --model_args pretrained=. --tasks textvqa_val --batch_size 8
    lmms-eval --model blip3 --model_args pretrained=.,subfolder=base,chat=False,do_image_splitting=False --tasks ...

Our checkpoints load as `blip3.checkpoints.locate` finds them, others by their name. Batches are padded on the left.
"""

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig

from ...answering import Answer, Answerer, pick_device, to_device
from ..answer import find_stops
from .prompts import Rendered, Renderer

OURS = "blip3"  # `model_type` of our configurations
MAX_NEW_TOKENS = 1024  # where a task names none
READ = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "length_penalty")


class InterleavedModel(lmms):
    """A vision-language model of transformers as lmms-eval asks it.

    Args:
        pretrained: a folder, or `owner/name` on the Hub.
        subfolder: of the checkpoint inside it.
        batch_size: prompts at once.
        device: as `answering.pick_device` takes it.
        dtype: `auto` takes the checkpoint's.
        chat: prompts through the chat template (True), as one text (False), or as the processor has one ("auto").
        end_of_shot: as `Renderer` takes it; `auto` for its default.
        max_new_tokens: of tasks that set none.
        seed: of tasks that sample.
        trust_remote_code: for checkpoints other than ours whose code is on the Hub.
        **image_options: arguments of the processor, such as `do_image_splitting=False` for the base resolution.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if the device is not there, or the processor has no image token.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        subfolder: str = "",
        batch_size: int | str = 1,
        device: str = "auto",
        dtype: str = "auto",
        chat: bool | str = "auto",
        end_of_shot: str = "auto",
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **image_options: Any,
    ):
        super().__init__()
        self.accelerator, device = self._join_processes(device)
        self.answerer = load_answerer(pretrained, subfolder, dtype, device, trust_remote_code)
        self.renderer = Renderer(
            self.answerer.processor,
            is_chat=None if chat == "auto" else bool(chat),
            end_of_shot=None if end_of_shot == "auto" else end_of_shot.replace("\\n", "\n"),
        )
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self.max_new_tokens, self.seed, self.image_options = max_new_tokens, seed, image_options
        self.stop_ids = find_stops(self.answerer.processor, self.answerer.model)

    def _join_processes(self, device: str) -> tuple[Any, str]:
        """Give the group of processes that `accelerate launch` or `torchrun` has started, and this one's device."""
        from accelerate import Accelerator

        accelerator = Accelerator()
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        return accelerator, str(accelerator.device) if accelerator.num_processes > 1 else pick_device(device)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests in batches of like settings; the order of the results is that of the requests."""
        prompts = [self._render(request) for request in requests]
        results: dict[int, GenerationResult] = {}
        bar = tqdm(total=len(requests), desc="Answers", unit="prompt", disable=self.rank != 0)
        for rows in self._batches(requests, prompts):
            settings = requests[rows[0]].args[2]
            for row, answer in zip(rows, self._answer([prompts[row] for row in rows], settings), strict=True):
                results[row] = self._result(answer, settings)
                self.cache_hook.add_partial("generate_until", (prompts[row].text, settings), results[row].text)
            bar.update(len(rows))
        bar.close()
        return [results[row] for row in range(len(requests))]

    def _render(self, request: Instance) -> Rendered:
        _, to_messages, _, row, task, split = request.args
        return self.renderer(to_messages(self.task_dict[task][split][row]))

    def _batches(self, requests: Sequence[Instance], prompts: Sequence[Rendered]) -> list[tuple[int, ...]]:
        """Group rows whose settings are equal and whose prompts are alike: with images or without, long ones first."""
        groups: dict[tuple[str, bool], list[int]] = {}
        for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            groups.setdefault((repr(request.args[2]), bool(prompt.images)), []).append(row)
        batches: list[tuple[int, ...]] = []
        for rows in groups.values():
            rows.sort(key=lambda row: (-len(prompts[row].images), -len(prompts[row].text), row))
            batches += [tuple(rows[at : at + self.batch_size]) for at in range(0, len(rows), self.batch_size)]
        return batches

    def _answer(self, prompts: Sequence[Rendered], settings: dict[str, Any]) -> list[Answer]:
        texts = [prompt.text for prompt in prompts]
        images = [[as_rgb(image) for image in prompt.images] for prompt in prompts]
        inputs = self.answerer.prepare(texts, images, **self.image_options)
        return self.answerer.generate(inputs, **self._generation(settings))

    def _generation(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Give the arguments of `generate`; greedy unless the task asks for samples at a temperature above 0."""
        known = {name: settings[name] for name in READ if settings.get(name) is not None}
        samples = bool(known.get("do_sample", True)) and float(known.get("temperature", 0.0)) > 0
        if not samples:
            known = {name: value for name, value in known.items() if name not in ("temperature", "top_p", "top_k")}
        defaults = {"max_new_tokens": self.max_new_tokens, "num_beams": 1}
        tokens = {"eos_token_id": self.stop_ids, "pad_token_id": self.answerer.processor.tokenizer.pad_token_id}
        return defaults | known | tokens | {"do_sample": samples, "seed": self.seed if samples else None}

    def _result(self, answer: Answer, settings: dict[str, Any]) -> GenerationResult:
        until = settings.get("until") or []
        text = cut_at([until] if isinstance(until, str) else until, answer.text)
        return GenerationResult(text=text, token_counts=TokenCounts(output_tokens=answer.num_tokens))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse: answers are generated here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{len(requests)} requests for likelihoods were sent, but --model blip3 generates answers. The task is "
            "probably of the kind multiple_choice or loglikelihood: choose its generating variant."
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse: one answer for each prompt.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{len(requests)} requests of several rounds were sent, but --model blip3 answers once. The task is "
            "probably an interactive one: choose another."
        )


def load_answerer(pretrained: str, subfolder: str, dtype: str, device: str, trust_remote_code: bool) -> Answerer:
    """Load one of our checkpoints as `Answerer.load` does, or any other of transformers by its name.

    Args:
        pretrained: a folder, or `owner/name` on the Hub.
        subfolder: of the checkpoint inside it.
        dtype: `auto` takes the checkpoint's.
        device: that is there.
        trust_remote_code: for other checkpoints than ours.

    Raises:
        OSError: if there is no such checkpoint.
    """
    config, _ = PretrainedConfig.get_config_dict(pretrained, subfolder=subfolder)
    if config.get("model_type") == OURS:
        return Answerer.load(pretrained, subfolder, dtype=dtype, device=device)
    source = {
        "pretrained_model_name_or_path": pretrained,
        "subfolder": subfolder,
        "trust_remote_code": trust_remote_code,
    }
    model = AutoModelForImageTextToText.from_pretrained(**source, dtype=dtype)
    return Answerer(AutoProcessor.from_pretrained(**source), to_device(model, device).eval())


def cut_at(stops: Sequence[str], text: str) -> str:
    """Give a text up to the first of some strings.

    >>> cut_at(["Question", "Answer"], "a dog Answer: Question")
    'a dog'
    """
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)].strip() if ends else text


def as_rgb(image: Any) -> Any:
    """Give an image that a processor takes: a path or URL as it is, a Pillow image as RGB."""
    return image if isinstance(image, str) or image.mode == "RGB" else image.convert("RGB")
