"""Scores of solutions by a sequence-classification model with one output: its raw logit, no activation (A2).

A question and a solution go through the model's chat template; the score is the head's output at the last token. Two
engines compute it. Both get the same token ids, and both run the head in float32: in bfloat16 a logit of 10 comes in
steps of 0.06, and good solutions would tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as logging_of_transformers

from hpc_rl.config.services import RewardModelServiceConfig
from hpc_rl.engines.chat import check_text, longest_input
from hpc_rl.engines.loading import ModelFolderError, choose_attention, control_tokens, pick_device

HEAD = "score.weight"
"""The head of transformers' decoder models, and the one that vLLM reads."""


class Judge(Protocol):
    """What computes logits."""

    def logits(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One raw logit per row of token ids, in order."""


class RewardModel:
    """A reward model and what belongs to it: chat template, limits, refusals.

    Parameters
    ----------
    path
        Model folder.
    judge
        Its weights at work.
    system_prompt
        Before each question; None = no system message.
    max_model_len
        Longest input, in tokens; None = the model's own limit.

    Raises
    ------
    ModelFolderError
        When the folder has no chat template that shows question and solution.
    """

    def __init__(
        self, path: str, judge: Judge, *, system_prompt: str | None = None, max_model_len: int | None = None
    ) -> None:
        self._judge, self._system_prompt = judge, system_prompt
        self.max_tokens = longest_input(path, max_model_len)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self._control = control_tokens(self._tokenizer)
        self._check_template(path)

    def _check_template(self, path: str) -> None:
        if self._tokenizer.chat_template is None:
            raise ModelFolderError(f"{path} has no chat template (chat_template.jinja), so it cannot read solutions")
        try:
            shown = self.render("\x01", "\x02")
        except Exception as error:  # templates are programs, and raise what they like
            raise ModelFolderError(f"the chat template of {path} takes no system, user, assistant: {error}") from error
        if "\x01" not in shown or "\x02" not in shown:
            raise ModelFolderError(f"the chat template of {path} does not show question and solution: {shown!r}")

    def render(self, question: str, solution: str) -> str:
        """The chat: system prompt, question, solution."""
        system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        chat = [*system, {"role": "user", "content": question}, {"role": "assistant", "content": solution}]
        text: str = self._tokenizer.apply_chat_template(chat, tokenize=False)
        return text

    def encode(self, question: str, solution: str) -> list[int]:
        """Token ids of the chat. Nothing is cut off: a score of half a solution is a score of something else.

        Raises
        ------
        ValueError
            When a text cannot be read (`check_text`), and when there are more than `max_tokens`.
        """
        for name, given in (("question", question), ("solution", solution)):
            check_text(name, given, self._control, self.max_tokens)
        text = self.render(question, solution)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > self.max_tokens:
            raise ValueError(f"question and solution are {len(ids)} tokens long; at most {self.max_tokens}")
        return ids

    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One raw logit per row of token ids, in order; NaN where the model makes none."""
        return self._judge.logits(rows) if rows else []


class TransformersJudge:
    """Logits by transformers.

    Parameters
    ----------
    path, dtype, attention
        The config's `services.reward_model` or `services.verifier` section.
    pass_tokens
        Tokens in one forward pass, padding included. Inputs of like length share a pass.

    Raises
    ------
    ModelFolderError
        When the folder's weights are no model with one output: transformers would draw a head at random.
    """

    def __init__(
        self, path: str, *, dtype: str = "float32", attention: str = "auto", pass_tokens: int = 32_768
    ) -> None:
        check_head(path)
        self.device, self._pass_tokens = pick_device(), pass_tokens
        logging_of_transformers.disable_progress_bar()  # in a job's log a bar is thousands of lines
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=getattr(torch, dtype),
            attn_implementation=choose_attention(attention, self.device),
            local_files_only=True,
            output_loading_info=True,
        )
        if found["missing_keys"]:
            raise ModelFolderError(f"{path} lacks the weights {', '.join(sorted(found['missing_keys'])[:5])}")
        model = model.to(self.device).eval()
        self._body, self._head = model.base_model, model.score.float()

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """See `Judge.logits`."""
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        while order:
            many = max(1, self._pass_tokens // len(rows[order[0]]))
            places, order = order[:many], order[many:]
            for place, score in zip(places, self._one_pass([rows[place] for place in places]), strict=True):
                scores[place] = score
        return scores

    def _one_pass(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Logits of rows that fit into one pass.

        Padding is on the right, where no token of a causal model sees it and all keep their positions. The last token
        is found by length: transformers' own pooling looks for the last id that is not the padding's, which is another
        token where a template ends with just that one.
        """
        lengths = [len(row) for row in rows]
        ids = torch.zeros((len(rows), max(lengths)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        states = self._body(ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False).last_hidden_state
        last = states[range(len(rows)), [length - 1 for length in lengths]]
        return [float(score) for score in self._head(last.float())[:, 0]]


class VllmJudge:
    """Logits by vLLM's pooling runner, which merges inputs of any length and keeps the question's prefix.

    Parameters
    ----------
    path, dtype, gpu_memory_utilization
        The config's `services.reward_model` or `services.verifier` section.
    max_model_len
        Longest input, in tokens; None = the model's own limit.

    Raises
    ------
    ModelFolderError
        When the folder's weights are no model with one output.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.8,
    ) -> None:
        check_head(path)
        from hpc_rl.engines.vllm_start import start_vllm

        self._llm = start_vllm(
            path,
            dtype=dtype,
            max_model_len=longest_input(path, max_model_len),
            gpu_memory_utilization=gpu_memory_utilization,
            runner="pooling",
            hf_overrides={"num_labels": 1},
        )

    def logits(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """See `Judge.logits`."""
        from vllm import PoolingParams

        outputs = self._llm.encode(
            [{"prompt_token_ids": list(row)} for row in rows],
            PoolingParams(use_activation=False),  # on by default, and a sigmoid squashes scores
            pooling_task="classify",
            use_tqdm=False,
        )
        return [float(output.outputs.data) for output in outputs]


def open_reward_model(path: str, options: RewardModelServiceConfig) -> RewardModel:
    """The model in a folder, with the engine and the settings of a service's section."""
    judge: Judge
    if options.engine == "vllm":
        judge = VllmJudge(
            path,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.gpu_memory_utilization,
        )
    else:
        judge = TransformersJudge(
            path, dtype=options.dtype, attention=options.attn_implementation, pass_tokens=options.max_pass_tokens
        )
    return RewardModel(path, judge, system_prompt=options.system_prompt, max_model_len=options.max_model_len)


def check_head(path: str) -> None:
    """Raise ModelFolderError unless the folder's weights have a head with one output."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            if HEAD not in weights.keys():  # noqa: SIM118 (no mapping)
                continue
            outputs = weights.get_slice(HEAD).get_shape()[0]
            if outputs != 1:
                raise ModelFolderError(f"the head of {path} has {outputs} outputs (num_labels); a reward model has one")
            return
    raise ModelFolderError(
        f"{path} is no reward model: no *.safetensors in it has a classification head ({HEAD}). Save a trained "
        "AutoModelForSequenceClassification there"
    )
