"""Detokenisation: any split of characters over tokens, and stop strings whatever the grouping."""

import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from orthrus.errors import ConfigError
from orthrus.text.stream import TextStream, token_bytes
from orthrus.text.tokenizer import load_tokenizer
from tests.hostile import bounded

SAMPLES = [
    "Plain words, and a second sentence.",
    "Größe 漢字 かな 👩‍👩‍👧‍👦 🏳️‍🌈 end",
    "tabs\tand\r\nlines\n\n  indented",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE of few merges, so that most non-ASCII characters take several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the words and the sentences of the test"] * 4, trainer)
    bpe.add_tokens([AddedToken("<think>", special=False), AddedToken("日本", special=False)])
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(path)
    return load_tokenizer(path)


def stream(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, str | None]:
    text = TextStream(tokenizer, stop)
    out = "".join(text.push(token) for token in ids)
    return out + text.finish(), text.stopped


@pytest.mark.parametrize("sample", SAMPLES)
def test_streamed_text_is_the_whole_text(tokenizer: Any, sample: str) -> None:
    ids = tokenizer.encode(sample)
    text = TextStream(tokenizer)
    pieces = [text.push(token) for token in ids]
    assert "".join(pieces) + text.finish() == sample
    assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_decode_as_the_tokenizer_decodes_them(tokenizer: Any) -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(24))]
        assert stream(tokenizer, ids)[0] == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_skipped_and_added_words_are_not(tokenizer: Any) -> None:
    ids = [tokenizer.eos_token_id, *tokenizer.encode("<think>a日本"), tokenizer.eos_token_id, 10**6]
    assert stream(tokenizer, ids) == ("<think>a日本", None)
    whole = TextStream(tokenizer, skip_special_tokens=False)
    assert whole.push(tokenizer.eos_token_id) == "<|end|>"


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer.encode("a漢")
    text = TextStream(tokenizer)
    assert [text.push(token) for token in ids[:-1]] == ["a", *[""] * (len(ids) - 2)]
    assert text.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("sample", "stop", "expected"),
    [
        ("one two three", ("two",), ("one ", "two")),
        ("one two", ("two three",), ("one two", None)),
        ("aaab", ("aab",), ("a", "aab")),
        ("abababac", ("ababac",), ("ab", "ababac")),
        ("xabcdex", ("abcde", "cd"), ("xab", "cd")),
        ("xabcd", ("bcd", "abcd", "d"), ("x", "abcd")),
        ("before\n\nafter", ("\n\n",), ("before", "\n\n")),
        ("ab漢字cd", ("字",), ("ab漢", "字")),
        ("stop", ("stop",), ("", "stop")),
    ],
)
def test_stop_strings(
    tokenizer: Any, sample: str, stop: tuple[str, ...], expected: tuple[str, str | None]
) -> None:
    assert stream(tokenizer, tokenizer.encode(sample), stop) == expected


def test_only_text_that_may_begin_a_stop_string_is_held_back(tokenizer: Any) -> None:
    text = TextStream(tokenizer, ("<<<", "<>"))
    spelled = [tokenizer.convert_tokens_to_ids(character) for character in "a<<b<"]
    assert [text.push(token) for token in spelled] == ["a", "", "", "<<b", ""]
    assert text.finish() == "<"


def test_stop_strings_agree_with_a_search_of_the_whole_text(tokenizer: Any) -> None:
    rng = random.Random(1)
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abc"]
    for _ in range(300):
        ids = [rng.choice(letters) for _ in range(30)]
        whole = tokenizer.decode(ids)
        stop = tuple("".join(rng.choice("abc") for _ in range(rng.randrange(1, 7))) for _ in range(4))
        ends = [(whole.find(s) + len(s), -len(s), s) for s in stop if s in whole]
        first = min(ends)[2] if ends else None
        expected = whole if first is None else whole[: whole.find(first)]
        assert stream(tokenizer, ids, stop) == (expected, first)


def test_many_stop_strings_are_cheap(tokenizer: Any) -> None:
    stop = tuple(f"the words and the {i}" for i in range(1000))
    ids = tokenizer.encode("the words and the sentences " * 200)
    begin = time.perf_counter()
    text, stopped = stream(tokenizer, ids, stop)
    seconds = time.perf_counter() - begin
    assert stopped is None
    assert text == tokenizer.decode(ids)
    assert seconds < 1e-3 * len(ids), f"{seconds / len(ids) * 1e6:.0f} us per token"


def test_a_stop_string_that_begins_again_with_each_character_is_cheap(tokenizer: Any) -> None:
    """Within the answer it may have begun at each of the characters that are held back."""
    ids = [tokenizer.convert_tokens_to_ids("a")] * 20_000
    with bounded():
        text, stopped = stream(tokenizer, ids, ("a" * 60_000, "ab"))
    assert (text, stopped) == ("a" * 20_000, None)


def test_stop_strings_of_many_requests_do_not_stay_in_memory(tokenizer: Any) -> None:
    rng = random.Random(2)
    tracemalloc.start()
    try:
        for _ in range(40):
            TextStream(tokenizer, tuple("".join(rng.choices("abcd", k=64)) for _ in range(20)))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 16 << 20  # Of all 40 sets it would be over 32 MiB.


def test_token_bytes_cover_every_byte(tokenizer: Any) -> None:
    table = token_bytes(tokenizer)
    single = {table[i] for i in range(len(tokenizer)) if len(table[i]) == 1}
    assert single == {bytes([byte]) for byte in range(256)}


def test_tokenizers_that_cannot_work_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
        )
    )
    with pytest.raises(ConfigError, match="not byte-level"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("min_tokens", "stopped"), [(0, True), (1, True), (2, True), (3, False), (9, False)])
def test_a_stop_string_within_the_minimum_is_text(tokenizer: Any, min_tokens: int, stopped: bool) -> None:
    """The stop string is complete with token 3, and comes once more later."""
    ids = [tokenizer.convert_tokens_to_ids(character) for character in "abcdefbcd"]
    text = TextStream(tokenizer, ("bc",), min_tokens=min_tokens)
    pieces = [text.push(token) for token in ids]
    said = "".join(pieces) + text.finish()
    if stopped:
        assert (said, text.stopped) == ("a", "bc")
    elif min_tokens == 3:
        assert (said, text.stopped) == ("abcdef", "bc")
    else:
        assert (said, text.stopped) == ("abcdefbcd", None)
