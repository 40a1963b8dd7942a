"""Runs of tests/training/on_policy_recipe.py: their samples, and what their trainings computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from hpc_rl import config as configs
from hpc_rl.engines.base import BAN_BIAS, banned_ids
from hpc_rl.engines.weights import weights_hash
from hpc_rl.orchestrate.job import load
from hpc_rl.orchestrate.start import open_run
from hpc_rl.run import manifest
from hpc_rl.run.workspace import Workspace
from hpc_rl.training.base import Driven
from tests.training.on_policy_recipe import SHARDS, OnPolicyConfig, asked, worth
from tools import tiny_sums

HERE = Path(__file__).parent
CONFIG = HERE / "on_policy.yaml"


@dataclass(frozen=True)
class Sample:
    """What the model said to a sum, and how likely each token was. `reward` None: nobody graded it."""

    sum: tiny_sums.Sum
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reward: tuple[float, float] | None

    @property
    def id(self) -> str:
        """Its name, by what it is."""
        return hashlib.sha256(repr((self.sum, self.token_ids, self.logprobs)).encode()).hexdigest()[:12]


@dataclass
class Trained:
    """What a training computed in each forward pass, and in each step."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    units: list[tuple[str, ...]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""


def open_(root: Path, model: Path, *settings: str) -> Workspace:
    """Write a run's config."""
    open_run(configs.load(CONFIG, [f"model.path={model}", *settings], {}, root, cwd=HERE.parents[1]), CONFIG)
    return Workspace(root)


def draw(ws: Workspace, seed: int = 0) -> list[Sample]:
    """A round's samples, as transformers draws them, with rewards."""
    config = config_of(ws)
    policy, speaks = _policy(config.model.path), tiny_sums.tokenizer()
    sums = [one for one in asked(config) for _ in range(config.sample.samples_per_prompt)]
    prompts = torch.tensor([speaks(tiny_sums.question(one))["input_ids"] for one in sums])
    torch.manual_seed(seed)
    with torch.no_grad():
        found = policy.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=config.sample.max_tokens,
            do_sample=True, top_k=0,
        )  # fmt: skip
    said = [_until_end(row) for row in found[:, prompts.size(1) :].tolist()]
    return graded(config, list(zip(sums, said, strict=True)))


def graded(
    config: OnPolicyConfig, said: Sequence[tuple[tiny_sums.Sum, tuple[int, ...]]], model: Path | None = None
) -> list[Sample]:
    """Samples with their log-probabilities under the run's initial model, or another one, and rewards."""
    policy, speaks = _policy(model or config.model.path), tiny_sums.tokenizer()
    samples = []
    for one, tokens in said:
        prompt = speaks(tiny_sums.question(one))["input_ids"]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + list(tokens)])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        text = speaks.decode(tokens, skip_special_tokens=True).replace(" ", "")
        samples.append(Sample(one, tokens, tuple(logprobs), worth(text, one)))
    return samples


def _policy(path: Any) -> Any:
    """The model without what sampling bans."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    bias = torch.zeros(model.config.vocab_size)
    bias[list(banned_ids(str(path), tiny_sums.tokenizer()))] = BAN_BIAS
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def _until_end(tokens: Sequence[int]) -> tuple[int, ...]:
    end = list(tokens).index(1) + 1 if 1 in tokens else len(tokens)
    return tuple(tokens[:end])


def commit(ws: Workspace, samples: Sequence[Sample], round: int = 1, weights: str | None = None) -> None:
    """Commit the graded stage: a group for each sum, every other one in the second shard."""
    job, config, speaks = load(ws.root, round, "graded"), config_of(ws), tiny_sums.tokenizer()
    job.folder.mkdir(parents=True, exist_ok=True)
    digest = weights or weights_hash(Path(config.model.path))
    groups: dict[tiny_sums.Sum, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.sum, []).append(sample)
    rows = [
        {
            "sample_id": f"{group}-{attempt}-{one.id}", "row_id": str(group), "role": "model", "group": group,
            "attempt": attempt, "prompt_token_ids": speaks(tiny_sums.question(of))["input_ids"],
            "token_ids": list(one.token_ids), "logprobs": list(one.logprobs),
            "finish_reason": "stop" if one.token_ids[-1] == 1 else "length",
            "weights_hash": digest, "left_out": one.reward is None,
            "reward_exact": 0.0 if one.reward is None else one.reward[0],
            "reward_digits": 0.0 if one.reward is None else one.reward[1],
            "reward": None if one.reward is None else one.reward[0] + 0.5 * one.reward[1],
        }
        for group, of in enumerate(groups)
        for attempt, one in enumerate(groups[of])
    ]  # fmt: skip
    schema = pa.Table.from_pylist(rows).schema
    for shard in job.shards():
        path = shard.output("graded.parquet")
        pq.write_table(pa.Table.from_pylist([r for r in rows if r["group"] % SHARDS == shard.index], schema), path)
        shard.commit([path], made_from={})


def train(ws: Workspace, round: int = 1) -> Trained:
    """Train in this process."""
    from jobs import train as body

    with noting() as found:
        assert body.main(["--workspace", str(ws.root), "--round", str(round)]) == 0
    made = manifest.read(ws, round, "train", 0)
    return replace(found, metrics=made.metrics, weights=made.made_from["weights_out"])


@contextmanager
def noting() -> Iterator[Trained]:
    """Note what trainers in this process compute."""
    found, compute_loss, norm = Trained(), Driven.compute_loss, Driven._get_grad_norm

    def noting_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        found.batches.append({n: v.clone() if torch.is_tensor(v) else v for n, v in inputs.items()})
        found.units.append(self._units)
        found.losses.append(float(loss.detach()))
        return loss

    def noting_norm(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.grad_norms.append(float(norm(self, *args, **kwargs)))
        return found.grad_norms[-1]

    Driven.compute_loss, Driven._get_grad_norm = noting_loss, noting_norm  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Driven.compute_loss, Driven._get_grad_norm = compute_loss, norm  # type: ignore[method-assign]


def config_of(ws: Workspace) -> OnPolicyConfig:
    """The run's config."""
    config = load(ws.root, 1, "train").config
    assert isinstance(config, OnPolicyConfig)
    return config
