# SPDX-License-Identifier: Apache-2.0
r"""`lmms-eval --model blip3`: vision-language models of transformers, with images where the prompt has them.

lmms-eval --model blip3 --model_args pretrained=. --tasks textvqa_val --batch_size 8
lmms-eval --model blip3 --model_args pretrained=.,subfolder=base,chat=False,do_image_splitting=False --tasks ...
"""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from .models import AUTO, ChatModel
from .prompts import Rendered

MAX_NEW_TOKENS = 1024  # where a task names none
READ = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "length_penalty")
SAMPLING = ("temperature", "top_p", "top_k")


class InterleavedModel(lmms):
    """A vision-language model of transformers as lmms-eval asks it.

    Args:
        pretrained: a folder, or `owner/name` on the Hub.
        batch_size: prompts at once.
        max_batch_size: given by lmms-eval and not used.
        max_new_tokens: of tasks that set none.
        seed: of tasks that sample.
        device: as `answering.pick_device` takes it; several processes choose their own.
        subfolder: and the next four, see `ChatModel`.
        dtype: see there.
        chat: see there.
        end_of_shot: see there.
        trust_remote_code: see there.
        **image_options: arguments of the image processor, such as `do_image_splitting=False` for the base resolution.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if the device is not there, the processor has no image token, or its image processor has no such
            argument.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        device: str = AUTO,
        subfolder: str = "",
        dtype: str = AUTO,
        chat: bool | str = AUTO,
        end_of_shot: str = AUTO,
        trust_remote_code: bool = False,
        **image_options: Any,
    ):
        super().__init__()
        self.accelerator = Accelerator()  # the group of processes that `accelerate launch` or torchrun has started
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.chat_model = ChatModel(
            pretrained,
            subfolder,
            dtype=dtype,
            device=str(self.accelerator.device) if self._world_size > 1 else device,
            chat=chat,
            end_of_shot=end_of_shot,
            trust_remote_code=trust_remote_code,
            image_options=image_options,
        )
        self.batch_size = 1 if batch_size == AUTO else int(batch_size)
        self.max_new_tokens, self.seed = max_new_tokens, seed

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests in batches of like settings; the order of the results is that of the requests."""
        prompts = [self._render(request) for request in requests]
        results: dict[int, GenerationResult] = {}
        bar = tqdm(total=len(requests), desc="Answers", unit="prompt", disable=self.rank != 0)
        for rows in self._batches(requests, prompts):
            settings = requests[rows[0]].args[2]
            answers = self.chat_model.answer([prompts[row] for row in rows], **self._generation(settings))
            for row, answer in zip(rows, answers, strict=True):
                text = cut_at(settings.get("until") or (), answer.text)
                results[row] = GenerationResult(text=text, token_counts=TokenCounts(output_tokens=answer.num_tokens))
                self.cache_hook.add_partial("generate_until", (prompts[row].text, settings), text)
            bar.update(len(rows))
        bar.close()
        return [results[row] for row in range(len(requests))]

    def _render(self, request: Instance) -> Rendered:
        _, to_messages, _, row, task, split = request.args
        return self.chat_model.render(to_messages(self.task_dict[task][split][row]))

    def _batches(self, requests: Sequence[Instance], prompts: Sequence[Rendered]) -> list[list[int]]:
        """Group rows whose settings are equal and that all have images or all have none; long ones first."""
        groups: dict[tuple[str, bool], list[int]] = {}
        for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            groups.setdefault((repr(request.args[2]), bool(prompt.images)), []).append(row)
        batches: list[list[int]] = []
        for rows in groups.values():
            rows.sort(key=lambda row: (-len(prompts[row].images), -len(prompts[row].text), row))
            batches += [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        return batches

    def _generation(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Give the arguments of `generate`; greedy unless the task asks for samples at a temperature above 0."""
        known = {name: settings[name] for name in READ if settings.get(name) is not None}
        samples = bool(known.pop("do_sample", True)) and float(known.get("temperature", 0.0)) > 0
        if not samples:
            known = {name: value for name, value in known.items() if name not in SAMPLING}
        seed = self.seed if samples else None
        return {"max_new_tokens": self.max_new_tokens, "num_beams": 1} | known | {"do_sample": samples, "seed": seed}

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


def cut_at(stops: str | Sequence[str], text: str) -> str:
    """Give a text up to the first of some strings.

    >>> cut_at(["Question", "Answer"], "a dog Answer: Question")
    'a dog'
    """
    ends = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop and stop in text]
    return text[: min(ends)].strip() if ends else text
