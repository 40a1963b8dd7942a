"""Prompts and stops before the engine starts: what is refused, dropped or cut, and what it costs to know."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from hpc_rl.engines.base import Prompt, Request, Sampling, generate
from hpc_rl.engines.loading import ModelFolderError
from hpc_rl.sampling.picture_tokens import PictureTokens
from hpc_rl.sampling.prompt_lengths import PromptReader
from hpc_rl.sampling.prompts import CheckedPrompts, PromptError, check_prompts

PIXELS = {"min_pixels": 784, "max_pixels": 12544}
CORPUS = ["Describe the main subject of the image.", "A red ring, a blue square.", "yes no"]
PLAIN_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
POSITIONS = 2048  # of the tiny model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen2-VL."""
    from tools.tiny_model import build, save

    path = tmp_path_factory.mktemp("models") / "speaker"
    save(*build(CORPUS, seed=0, layers=2), path)
    return str(path)


@pytest.fixture(scope="session")
def reader(folder: str) -> PromptReader:
    return PromptReader(folder, **PIXELS)


@pytest.fixture(scope="session")
def engine(folder: str) -> Any:
    from hpc_rl.engines.transformers_engine import TransformersEngine

    return TransformersEngine(folder, **PIXELS)


def numbered(prompts: Sequence[Prompt]) -> Iterator[tuple[str, Prompt]]:
    return ((f"r{place}", prompt) for place, prompt in enumerate(prompts))


def check(folder: str, *prompts: Prompt, max_tokens: int = 16, **options: Any) -> CheckedPrompts:
    return check_prompts(numbered(prompts), folder, Sampling(1.0, max_tokens), **{**PIXELS, **options})


def length(reader: PromptReader, prompt: Prompt) -> int:
    (found,) = reader.exactly([prompt])
    assert isinstance(found, int)
    return found


def picture(tmp_path: Path, name: str = "ring.png", size: tuple[int, int] = (56, 56)) -> Path:
    Image.new("RGB", size, "red").save(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("size", [(56, 56), (20, 20), (300, 40), (40, 300), (1, 150), (501, 777)])
def test_a_length_is_what_the_engine_reads(
    engine: Any, reader: PromptReader, tmp_path: Path, size: tuple[int, int]
) -> None:
    file = picture(tmp_path, size=size)
    prompts = [
        Prompt.of("Describe the ring."),
        Prompt.of("Describe.", file),
        Prompt.of("Which of these?", file, picture(tmp_path, "other.png")),
        Prompt(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß Gott, 你好"})),
    ]
    read = generate(engine, [Request(prompt, 0) for prompt in prompts], Sampling(1.0, 1))
    lengths = reader.exactly(prompts)
    assert lengths == [len(completion.prompt_token_ids) for completion in read]
    assert all(reader.at_most(prompt) >= found for prompt, found in zip(prompts, lengths, strict=True))


@pytest.fixture(scope="session")
def composing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a byte-level tokenizer that normalizes to NFC, as Qwen's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "composing"
    alphabet = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**alphabet, "<s>": 256, "</s>": 257}, []))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=PLAIN_TEMPLATE
    ).save_pretrained(path)
    LlamaConfig(max_position_embeddings=4096, vocab_size=258).save_pretrained(path)
    return str(path)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\u0958" * 40)  # NFC takes it apart: 3 bytes become 6
@example("\U0001d160" * 40)  # and this one's 4 bytes 12
def test_nor_is_one_longer_whose_characters_the_tokenizer_composes(composing: str, text: str) -> None:
    reader = _composing_reader(composing)
    prompt = Prompt(({"role": "user", "content": text},))
    if not any(token in text for token in reader.control):
        assert length(reader, prompt) <= reader.at_most(prompt) <= 2 + 3 * len(text.encode())


@cache
def _composing_reader(path: str) -> PromptReader:
    reader = PromptReader(path)
    assert length(reader, Prompt(({"role": "user", "content": "e\u0301"},))) == len("\u00e9".encode())
    return reader


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3), st.booleans())
@example(["  \n\t a", " \u00a0 "], True)
def test_no_prompt_is_longer_than_it_is_said_to_be_at_most(
    reader: PromptReader, texts: list[str], in_parts: bool
) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": text}] if in_parts else text}
        for text in texts
        if not any(token in text for token in reader.control)
    ]
    prompt = Prompt((*messages, {"role": "user", "content": "Well?"}))
    assert length(reader, prompt) <= reader.at_most(prompt) < 1000 + 4 * sum(len(text.encode()) for text in texts)


def test_the_bound_is_close_enough_to_spare_ordinary_prompts(reader: PromptReader) -> None:
    prompt = Prompt.of("Describe the main subject of the image in one sentence.")
    assert reader.at_most(prompt) <= len("Describe the main subject of the image in one sentence.") + 30


def test_a_template_that_writes_a_text_twice_is_found_out(folder: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }} Again: {{ m['content'] }}{% endfor %}"
    reader = PromptReader(with_template(folder, tmp_path, template), **PIXELS)
    prompt = Prompt(({"role": "user", "content": "ß!ö" * 50},))
    assert length(reader, prompt) <= reader.at_most(prompt)
    assert reader.at_most(prompt) >= 2 * 50 * 5


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 20), st.sampled_from([1, 2, 7, 16, 150, 512, 1280]))
@example(1, 200, 1, 1)
def test_no_picture_has_more_tokens_than_any_may_have(
    processor: Any, width: int, height: int, least: int, most: int
) -> None:
    if max(width, height) > 200 * min(width, height) or least > most:
        return
    images = processor.image_processor
    images.size["shortest_edge"], images.size["longest_edge"] = 784 * least, 784 * most
    (tokens,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
    assert tokens <= PictureTokens(processor).most


@pytest.fixture(scope="session")
def processor(folder: str) -> Any:
    from hpc_rl.engines.loading import load_processor

    return load_processor(folder, **PIXELS)


def test_a_prompt_that_just_fits_is_fine_and_one_token_more_is_not(folder: str, reader: PromptReader) -> None:
    prompt = Prompt.of("ring " * 100)
    limit = length(reader, prompt) + 16
    found = check(folder, prompt, max_model_len=limit)
    assert found == CheckedPrompts(1, limit - 16, frozenset(), "error") and found.fit("r0", prompt) is prompt
    with pytest.raises(PromptError, match=rf"row r0: {limit - 16} tokens"):
        check(folder, prompt, max_model_len=limit - 1)


def test_rows_that_are_too_long_are_named_all_at_once_with_the_ways_out(
    folder: str, reader: PromptReader, tmp_path: Path
) -> None:
    long = Prompt.of("ring " * 300)
    prompts = [Prompt.of("ring")] * 2 + [long] * 7
    with pytest.raises(PromptError) as caught:
        check(folder, *prompts, max_model_len=200)
    message, tokens = str(caught.value), length(reader, long)
    assert message.startswith("7 of 9 prompts are longer than the 184 tokens that sample.max_tokens leaves of 200. ")
    assert "; ".join(f"row r{place}: {tokens} tokens" for place in range(2, 7)) + "; and 2 more. " in message
    for way_out in ("sample.max_model_len", "sample.max_tokens", "drop", "truncate_left"):
        assert way_out in message
    assert "max_pixels" not in message, "texts have none"
    with pytest.raises(PromptError, match=r"lower speaker\.max_pixels"):
        check(folder, Prompt.of("ring " * 300, picture(tmp_path)), max_model_len=200)


def test_long_rows_are_dropped_and_told_of(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    short, long = Prompt.of("ring"), Prompt.of("ring " * 300)
    with caplog.at_level(logging.WARNING):
        found = check(folder, short, long, long, max_model_len=200, how="drop")
    assert (found.checked, found.dropped) == (3, {"r1", "r2"})
    assert [found.fit(f"r{place}", prompt) for place, prompt in enumerate([short, long, long])] == [short, None, None]
    assert "dropped: 2 of 3 prompts are longer than the 184 tokens" in caplog.text and "row r1: " in caplog.text


def test_a_round_of_which_nothing_is_left_is_no_round(folder: str) -> None:
    with pytest.raises(PromptError, match=r"2 of 2 prompts .* sample.long_prompts = drop leaves none"):
        check(folder, *[Prompt.of("ring " * 300)] * 2, max_model_len=200, how="drop")


def test_rows_of_which_each_is_too_long_for_one_role_leave_none(folder: str) -> None:
    long, short = Prompt.of("ring " * 300), Prompt.of("ring")
    options: dict[str, Any] = {**PIXELS, "max_model_len": 200, "how": "drop"}
    by_role = [("r0", long), ("r0", short), ("r1", short), ("r1", long)]
    with pytest.raises(PromptError, match=r"2 of 4 prompts .* sample.long_prompts = drop leaves none"):
        check_prompts(by_role, folder, Sampling(1.0, 16), **options)
    assert check_prompts([*by_role, ("r2", short)], folder, Sampling(1.0, 16), **options).dropped == {"r0", "r1"}


def test_a_long_text_is_cut_on_the_left(folder: str, engine: Any) -> None:
    long = Prompt.of("ring " * 300 + "Describe the square.")
    found = check(folder, long, max_model_len=200, how="truncate_left")
    cut = found.fit("r0", long)
    assert cut is not None and cut.keep_tokens == 184 and not found.dropped
    whole, part = generate(engine, [Request(long, 0), Request(cut, 0)], Sampling(1.0, 1))
    assert part.prompt_token_ids == whole.prompt_token_ids[-184:]


def test_a_prompt_with_images_cannot_be_cut(folder: str, tmp_path: Path) -> None:
    long = Prompt.of("ring " * 300, picture(tmp_path))
    with pytest.raises(PromptError, match=r"1 prompts .* have images, which cannot be cut: row r1: \d+ tokens.*drop"):
        check(folder, Prompt.of("ring " * 300), long, max_model_len=200, how="truncate_left")
    assert check(folder, Prompt.of("ring"), long, max_model_len=200, how="drop").dropped == {"r1"}


def test_a_picture_counts_by_its_size_and_is_not_opened_where_none_could_matter(
    folder: str, reader: PromptReader, tmp_path: Path
) -> None:
    absent = Prompt.of("Describe.", tmp_path / "absent.png")
    assert check(folder, absent, max_model_len=200).checked == 1
    small, large = (Prompt.of("Describe.", picture(tmp_path, f"{n}.png", (n, n))) for n in (28, 112))
    assert length(reader, large) - length(reader, small) == 15
    limit = length(reader, small) + 16
    with pytest.raises(PromptError, match=r"1 of 2 .* row r1: \d+ tokens"):
        check(folder, small, large, max_model_len=limit)
    with pytest.raises(PromptError, match=r"row r1: .*absent.png cannot be read"):
        check(folder, small, absent, max_model_len=limit)


def test_only_the_header_of_a_picture_is_read_once_the_rule_is_known(folder: str, tmp_path: Path) -> None:
    reader = PromptReader(folder, **PIXELS)
    whole, cut = picture(tmp_path, "whole.png", (301, 99)), tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:100])
    lengths = reader.exactly([Prompt.of("Describe.", path) for path in (whole, whole, cut)])
    assert lengths[0] == lengths[1] == lengths[2]


def test_pictures_are_processed_where_the_rule_for_sizes_is_wrong(
    folder: str, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a processor that puts more than the image's tokens into the text."""
    reader = PromptReader(folder, **PIXELS)
    kind = type(reader._pictures._processor)
    right = kind._get_num_multimodal_tokens

    def wrong(self: Any, image_sizes: Any) -> Any:
        return {"num_image_tokens": [count + 1 for count in right(self, image_sizes)["num_image_tokens"]]}

    monkeypatch.setattr(kind, "_get_num_multimodal_tokens", wrong)
    prompts = [Prompt.of("Describe.", picture(tmp_path, f"{n}.png", (n, 56))) for n in (28, 112)]
    read = generate(engine, [Request(prompt, 0) for prompt in prompts], Sampling(1.0, 1))
    assert reader.exactly(prompts) == [len(completion.prompt_token_ids) for completion in read]


@pytest.mark.parametrize("how", ["error", "drop", "truncate_left"])
def test_a_control_token_in_a_text_is_named_with_its_row(folder: str, how: str) -> None:
    prompts = [Prompt.of("ring"), Prompt.of("a <|image_pad|>"), Prompt.of("ring<|im_end|>\n<|im_start|>system")]
    with pytest.raises(PromptError) as caught:
        check(folder, *prompts, how=how)
    message = str(caught.value)
    assert message.startswith("2 of 3 prompts cannot be sampled from. row r1: ")
    assert "holds the control token <|image_pad|>; row r2: " in message and "Correct these rows" in message


def test_what_is_no_text_is_named_with_its_row(folder: str) -> None:
    with pytest.raises(PromptError, match="row r0: the content of message 0 is no text: surrogates not allowed"):
        check(folder, Prompt.of("ring \ud800"))


def test_images_and_their_places_must_agree(folder: str, tmp_path: Path) -> None:
    lost = Prompt(({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},))
    with pytest.raises(PromptError, match="row r0: it has 0 images and 1 places for images"):
        check(folder, lost)
    with pytest.raises(PromptError, match=r"row r0: it has images, but .* set min_pixels and max_pixels"):
        check(folder, Prompt.of("Which?", picture(tmp_path)), min_pixels=None, max_pixels=None)


def with_template(folder: str, tmp_path: Path, template: str) -> str:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / "chat_template.jinja").write_text(template)
    return str(changed)


def test_messages_that_the_template_refuses_are_named_with_their_rows(folder: str, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    strict = with_template(folder, tmp_path, template)
    plain = Prompt(({"role": "user", "content": "ring"},))
    system = Prompt(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "ring"}))
    assert check(strict, plain).checked == 1
    with pytest.raises(
        PromptError, match=r"2 of 3 .* row r1: the chat template does not take .*no system role; row r2"
    ):
        check(strict, plain, system, system)


def test_a_folder_without_a_template_cannot_read_messages(folder: str, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(ModelFolderError, match="no chat template"):
        check(str(bare), Prompt.of("ring"))


def test_completions_that_leave_no_room_and_lengths_beyond_the_model_are_refused(folder: str) -> None:
    with pytest.raises(PromptError, match=f"sample.max_tokens = {POSITIONS} leaves no room for a prompt"):
        check(folder, Prompt.of("ring"), max_tokens=POSITIONS)
    with pytest.raises(ModelFolderError, match=f"max_model_len is {POSITIONS + 1}"):
        check(folder, Prompt.of("ring"), max_model_len=POSITIONS + 1)


def test_a_text_that_fits_nowhere_is_not_tokenised(folder: str, tmp_path: Path) -> None:
    endless = Prompt.of("ring " * 10_000_000)  # tokenising it takes more than a minute and gigabytes
    assert check(folder, Prompt.of("ring"), endless, how="drop").dropped == {"r1"}
    with pytest.raises(PromptError, match="row r0: a text of 50000000 characters"):
        check(folder, endless)


def test_other_tokenizers_are_asked_for_every_length(tmp_path: Path) -> None:
    """Sentencepiece's way, in which a text may get spaces of its own: bytes say nothing certain."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "\u2581", "\u2581ring", "\u2581a"]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=PLAIN_TEMPLATE
    ).save_pretrained(tmp_path)
    LlamaConfig(max_position_embeddings=64, vocab_size=6).save_pretrained(tmp_path)
    reader = PromptReader(str(tmp_path))
    prompt = Prompt(({"role": "user", "content": "a" * 30},))
    assert reader.at_most(prompt) == float("inf")
    options: Any = {"min_pixels": None, "max_pixels": None, "max_model_len": length(reader, prompt) + 16}
    assert check(str(tmp_path), prompt, **options).checked == 1
    longer = Prompt(({"role": "user", "content": "a" * 31},))
    with pytest.raises(PromptError, match=r"1 of 2 .* row r1"):
        check(str(tmp_path), prompt, longer, **options)


@pytest.mark.parametrize(
    ("stop", "complaint"),
    [
        ("<|im_end|>", r"holds the control token <\|im_end\|>"),
        ("\n<|endoftext|>", r"holds the control token <\|endoftext\|>"),
        ("\ud800", "is no text: surrogates not allowed"),
    ],
)
def test_stops_that_never_end_a_completion_are_refused(folder: str, stop: str, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        check_prompts(numbered([Prompt.of("ring")]), folder, Sampling(1.0, 16, stop=("\n\n", stop)), **PIXELS)


def test_a_stop_that_the_tokenizer_writes_otherwise_is_refused(composing: str) -> None:
    options: Any = {"min_pixels": None, "max_pixels": None}
    with pytest.raises(PromptError, match="does not write the stop 'e\u0301nd' but '\u00e9nd'"):
        check_prompts([], composing, Sampling(1.0, 16, stop=("e\u0301nd",)), **options)
    assert check_prompts([], composing, Sampling(1.0, 16, stop=("\u00e9nd",)), **options).checked == 0


def test_ordinary_stops_are_fine(folder: str) -> None:
    stops = ("\n\n", "</detailed>", " ", "Ende \u00e9", "\U0001f600")
    found = check_prompts(numbered([Prompt.of("ring")]), folder, Sampling(1.0, 16, stop=stops), **PIXELS)
    assert found.checked == 1
