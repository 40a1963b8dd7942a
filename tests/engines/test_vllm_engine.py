"""The vLLM engine, run once in a process of its own: it agrees with the transformers engine sample by sample."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.engines.base import Completion, Sampling, banned_ids, generate
from hpc_rl.engines.loading import load_processor
from hpc_rl.engines.transformers_engine import TransformersEngine
from hpc_rl.engines.vllm_engine import lora_id

from .conftest import NO_THOUGHTS, PIXELS, requests
from .sample_with_vllm import PLAIN, last_tokens

pytest.importorskip("vllm", reason="vLLM is not installed here")


@pytest.fixture(scope="module")
def sampled(
    run_with_vllm: Callable[..., None],
    speaker_folder: Path,
    adapter_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """What `sample_with_vllm.py` got, by the name of the run."""
    folder = tmp_path_factory.mktemp("vllm")
    run_with_vllm(Path(__file__).with_name("sample_with_vllm.py"), speaker_folder, adapter_folder, folder)
    return _read(json.loads((folder / "completions.json").read_text()))


def _read(data: Any) -> Any:
    """Completions where there are any."""
    if isinstance(data, dict):
        if "token_ids" in data:
            return Completion(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})
        return {name: _read(value) for name, value in data.items()}
    return [_read(one) for one in data] if isinstance(data, list) else data


def assert_same_samples(one: Sequence[Completion], other: Sequence[Completion]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.prompt_token_ids == b.prompt_token_ids
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.fixture(scope="module")
def other(speaker_folder: Path) -> TransformersEngine:
    return TransformersEngine(str(speaker_folder), **PIXELS)


@pytest.mark.parametrize(("run", "temperature"), [("plain", 1.0), ("cool", 0.6), ("greedy", 0.0)])
def test_both_engines_draw_the_same_samples(
    sampled: Any, other: TransformersEngine, run: str, temperature: float
) -> None:
    assert_same_samples(sampled[run], generate(other, requests(), Sampling(temperature, 12)))


def test_more_prompts_than_one_step_reads_are_all_answered(sampled: Any) -> None:
    assert len(sampled["many"]) == 400 and sum(len(c.prompt_token_ids) for c in sampled["many"]) > 4096
    assert [c.token_ids for c in sampled["many"][:4]] == [c.token_ids[:2] for c in sampled["plain"][:4]]


def test_a_lora_request_is_what_peft_computes(sampled: Any, speaker_folder: Path, adapter_folder: Path) -> None:
    adapted, without = (
        generate(TransformersEngine(str(speaker_folder), folder, variables=NO_THOUGHTS, **PIXELS), requests(), PLAIN)
        for folder in (adapter_folder, None)
    )
    assert_same_samples(sampled["adapter"], adapted)
    assert [c.token_ids for c in sampled["adapter"]] != [c.token_ids for c in without]
    assert sampled["adapter"][0].prompt_token_ids != sampled["plain"][0].prompt_token_ids, "a template's variable"


def test_adapters_of_different_rounds_have_different_numbers() -> None:
    numbers = [lora_id(f"speaker-{weights:016x}") for weights in range(1000)]
    assert len(set(numbers)) == 1000 and min(numbers) > 0 and max(numbers) < 2**31
    assert numbers[3] == lora_id("speaker-0000000000000003")


def test_samples_do_not_depend_on_what_the_engine_did_before(sampled: Any) -> None:
    assert_same_samples(sampled["after others"], sampled["plain"])
    assert_same_samples(sampled["alone"], sampled["plain"])


def test_images_may_be_files(sampled: Any) -> None:
    assert_same_samples(sampled["by path"], sampled["plain"])


def test_requests_join_a_running_batch_and_leave_it_as_they_finish(sampled: Any) -> None:
    made, keys = sampled["in two waves"], sampled["keys in order"]
    assert sorted(map(int, keys)) == list(range(16))
    assert_same_samples(made[:8], sampled["plain"][:8])
    assert [c.token_ids for c in made[8:]] == [c.token_ids[:3] for c in sampled["plain"][8:]]
    longest = {str(place) for place in range(8) if len(made[place].token_ids) == 12}
    assert longest and set(keys[-len(longest) :]) == longest


def test_what_was_aborted_does_not_come_back_unless_asked_for_again(sampled: Any) -> None:
    made = sampled["after an abort"]
    assert set(made) == {"0", "1", "2"}
    assert_same_samples([made[key] for key in "012"], sampled["plain"][:3])


def test_both_engines_end_at_the_same_stop(sampled: Any, other: TransformersEngine) -> None:
    stops = tuple(sampled["stops"])
    made = sampled["stopped"]
    assert_same_samples(made, generate(other, requests(), Sampling(1.0, 24, stop=stops)))
    ended = [c.text for c in made if any(stop in c.text for stop in stops)]
    assert len(ended) > 1 and all(text.endswith(stops) for text in ended)


def test_the_last_tokens_of_a_prompt_are_read_where_it_says_so(sampled: Any, other: TransformersEngine) -> None:
    (made,) = sampled["last tokens"]
    assert len(made.prompt_token_ids) == 8
    assert_same_samples([made], generate(other, [last_tokens(8)], Sampling(1.0, 12)))


def test_what_has_to_give_its_memory_up_is_sampled_as_if_it_had_not(sampled: Any) -> None:
    assert sampled["capacity"] == 12
    assert sampled["preemptions"] > 0
    assert max(len(c.token_ids) for c in sampled["long"]) == 150
    assert_same_samples(sampled["with preemptions"], sampled["long"])


def test_a_request_that_cannot_be_taken_is_refused_and_costs_the_others_nothing(sampled: Any) -> None:
    said = sampled["refusals"]
    assert "tokens; the engine takes 256" in said["long"] and "max_model_len" in said["long"]
    assert "the engine takes 256" in said["long with its image"]
    assert "broken.png cannot be read: it is no picture" in said["broken image"]
    assert said["schema"] and "in flight already" in said["in flight"]
    assert said["completion in flight"] == sampled["plain"][0].text
    assert sampled["prompts kept"] == 0


def test_a_request_that_will_never_finish_is_not_waited_for(sampled: Any) -> None:
    assert sampled["lost"] == "vLLM has lost 1 requests, lost among them"


def test_control_tokens_are_never_sampled(sampled: Any, speaker_folder: Path) -> None:
    banned = set(banned_ids(speaker_folder, load_processor(speaker_folder, **PIXELS).tokenizer))
    tokens = [token for completion in sampled["hot"] for token in completion.token_ids]
    assert len(tokens) > 1500 and not set(tokens) & banned
