"""Training texts that the engine writes, and drafts measured on it."""

from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.numpy import load_file as load_numpy

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.requests.request import SamplingParams
from orthrus.training.data import DataSettings, generate, read_shards
from orthrus.training.eval import EvalSettings, distinct_ngrams, measure_drafts
from tests.reference import Reference


@pytest.fixture(scope="module")
def engine_config(tiny_orthrus: Path) -> EngineConfig:
    return EngineConfig(
        model=str(tiny_orthrus), adaptive_draft=False, draft_length=4, kv_cache_tokens=1024, max_model_len=128
    )


def test_answers_are_the_engines_and_their_shards_are_shared_out(
    engine_config: EngineConfig, tmp_path: Path
) -> None:
    prompts = [[1, 2, 3], [4, 5], [6], list(range(50))]
    settings = DataSettings(prompts=Path("p"), length=20, temperatures=(0.0, 1.0), shard_texts=4, seed=7)

    def make_engine() -> Engine:
        return Engine.from_pretrained(engine_config)

    for rank in range(2):
        generate(make_engine, prompts, settings, tmp_path / "two", {"model": "m"}, rank=rank, world=2)
    generate(make_engine, prompts, settings, tmp_path / "one", {"model": "m"})
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    # The prompt that is too long is left out; request i * 2 + j is prompt i at temperature j.
    shards = [load_numpy(tmp_path / "one" / f"shard-0000{i}.safetensors") for i in range(2)]
    texts = [text for s in shards for text in split(s["tokens"].tolist(), s["lengths"].tolist())]
    assert [len(shard["lengths"]) for shard in shards] == [4, 2]
    assert read_shards(tmp_path / "one").tolist() == [token for text in texts for token in text]
    engine = make_engine()
    for number, text in enumerate(texts):
        prompt = prompts[number // 2]
        params = SamplingParams(
            temperature=(0.0, 1.0)[number % 2], seed=7 + number, max_tokens=20 - len(prompt)
        )
        ((completion,),) = engine.generate([prompt], params)
        assert text == [*prompt, *completion.token_ids]
    assert engine.stats.tokens_per_cycle > 1.0
    with pytest.raises(ConfigError, match="begun with other settings"):
        generate(make_engine, prompts, settings, tmp_path / "one", {"model": "another"})


def split(tokens: list[int], lengths: list[int]) -> list[list[int]]:
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def test_measured_cycles_are_those_of_the_reference(
    engine_config: EngineConfig, tiny_orthrus: Path, tiny_reference: Reference
) -> None:
    full = engine_config.model_copy(update={"draft_length": 8})
    settings = EvalSettings(new_tokens=24, temperatures=(0.0,))
    engine = Engine.from_pretrained(full)
    prompts = [[1, 2, 3], [9, 8, 7, 6]]
    values, texts = measure_drafts(engine, prompts, settings, block_rows=8, lead=False, temperature=0.0)
    committed = cycles = 0
    for prompt, text in zip(prompts, texts, strict=True):
        expected, count = tiny_reference.decode(prompt, 24)
        assert text == expected
        committed, cycles = committed + len(expected) - 1, cycles + count
    assert values["tokens_per_cycle"] == round(committed / cycles, 3) > 1.0
    reach, agreement = values["acceptance"], values["agreement"]
    assert len(reach) == len(agreement) == 7
    assert all(a >= b for a, b in pairwise(reach))
    assert reach[0] == agreement[0] > 0
    with_lead, same = measure_drafts(engine, prompts, settings, block_rows=8, lead=True, temperature=0.0)
    assert same == texts
    assert with_lead["tokens_per_cycle"] >= 2.0
    # The lead's token is right in every cycle, whatever the block's first draft was.
    reach = with_lead["acceptance"]
    assert len(reach) == len(with_lead["agreement"]) == 8
    assert 1.0 == reach[0] > with_lead["agreement"][0] > 0
    assert all(a >= b for a, b in pairwise(reach))


def test_distinct_ngrams_counts_first_occurrences() -> None:
    assert distinct_ngrams([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct_ngrams([1, 2, 3], 2) == 1.0
