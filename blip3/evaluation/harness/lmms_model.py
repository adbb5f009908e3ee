# SPDX-License-Identifier: Apache-2.0
r"""`lmms-eval --model blip3`: vision-language models of transformers, with images where the prompt has them.

lmms-eval --model blip3 --model_args pretrained=. --tasks textvqa_val --batch_size 8
lmms-eval --model blip3 --model_args pretrained=.,subfolder=base,chat=False,do_image_splitting=False --tasks ...
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .models import AUTO, ChatModel, read_count, read_switch
from .prompts import Rendered

MAX_NEW_TOKENS = 1024  # where a task names none
STOPS = "until"  # of lmms-eval; answers are cut at them here
OURS_TO_SAY = (
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "stop_strings"),
    *("num_return_sequences", "return_dict_in_generate", "output_attentions", "output_hidden_states"),
    *("output_logits", "output_scores", "is_assistant", "transformers_version"),
)
"""What `GenerationConfig` knows beside what a task may set: one answer of plain tokens is read for each prompt."""
KNOWN = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {*OURS_TO_SAY}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
NEUTRAL = (0, 1)  # values of these with which they change nothing, as many tasks write them

logger = logging.getLogger(__name__)


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
        ValueError: if the device is not there, the processor has no image token, its image processor has no such
            argument, or one has no such value.
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
        self.max_new_tokens, self.seed = read_count("max_new_tokens", max_new_tokens), read_count("seed", seed, 0)
        self.batch_size = 1 if batch_size == AUTO else read_count("batch_size", batch_size)
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
        self._warned: set[str] = set()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer requests in batches of like settings; the order of the results is that of the requests."""
        prompts = [self._render(request) for request in requests]
        results: dict[int, GenerationResult] = {}
        bar = tqdm(total=len(requests), desc="Answers", unit="prompt", disable=self.rank != 0)
        for rows in self._batches(requests, prompts):
            settings = requests[rows[0]].args[2]
            answers = self.chat_model.answer([prompts[row] for row in rows], **self._generation(settings))
            for row, answer in zip(rows, answers, strict=True):
                text = cut_at(settings.get(STOPS) or (), answer.text)
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
        """Give the arguments of `generate`: whatever a task or `--gen_kwargs` sets and transformers knows."""
        given = {name: value for name, value in settings.items() if value is not None and name != STOPS}
        self._warn_once([name for name in given if name not in KNOWN], "which is not passed to the model")
        known = {name: value for name, value in given.items() if name in KNOWN}
        is_sampled = samples(known)
        if not is_sampled:
            left = [name for name in SAMPLING if known.get(name, 0) not in NEUTRAL]
            self._warn_once(left, "but nothing is sampled: answers are greedy")
            known = {name: value for name, value in known.items() if name not in SAMPLING}
        about = {"do_sample": is_sampled, "seed": self.seed if is_sampled else None}
        return {"max_new_tokens": self.max_new_tokens, "num_beams": 1} | known | about

    def _warn_once(self, names: Sequence[str], what: str) -> None:
        """Say that generation arguments have no effect, each of them once."""
        for name in names:
            if name not in self._warned and self.rank == 0:
                logger.warning("A task or --gen_kwargs sets %s, %s.", name, what)
                self._warned.add(name)

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


def samples(settings: Mapping[str, Any]) -> bool:
    """Whether answers are sampled; at a temperature of 0 they are greedy, as in lmms-eval's own models.

    >>> samples({"do_sample": True}), samples({"temperature": 0.7}), samples({"do_sample": True, "temperature": 0})
    (True, True, False)
    >>> samples({}), samples({"top_p": 0.9}), samples({"do_sample": False, "temperature": 0.7})
    (False, False, False)
    """
    is_asked = read_switch("do_sample", settings["do_sample"]) if "do_sample" in settings else None
    temperature = settings.get("temperature")
    if temperature is None:
        return bool(is_asked)
    return is_asked is not False and float(temperature) > 0


def cut_at(stops: str | Sequence[str], text: str) -> str:
    """Give a text up to the first of some strings.

    >>> cut_at(["Question", "Answer"], "a dog Answer: Question")
    'a dog'
    """
    ends = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops) if stop and stop in text]
    return text[: min(ends)].strip() if ends else text
