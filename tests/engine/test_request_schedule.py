"""A request may choose how it is decoded. Its text is the same, and so is that of the requests beside it."""

from dataclasses import replace
from pathlib import Path

import pytest

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import RequestError
from orthrus.requests.request import SamplingParams
from tests.checkpoints import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, logprobs=1)
SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=40, ignore_eos=True)
PROMPTS = [[5, 9, 2, 7], [8, 8, 1], [3] * 20, [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("schedule") / "model", noise=0.02)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    config = EngineConfig(model=str(checkpoint), adaptive_draft=False, max_num_seqs=16)
    return Engine.from_pretrained(config)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_requests_of_both_schedules_share_passes(engine: Engine, params: SamplingParams) -> None:
    expected = [engine.generate([prompt], params)[0][0] for prompt in PROMPTS]
    choices = ["ar", "orthrus", "auto", "ar"]
    together = engine.generate(PROMPTS, [replace(params, schedule=name) for name in choices])
    for [got], alone, name in zip(together, expected, choices, strict=True):
        assert (got.token_ids, got.logprobs) == (alone.token_ids, alone.logprobs)
        if name == "ar":
            assert got.stats.tokens_per_cycle == 1.0 and got.stats.passes == 39
        else:
            assert got.stats.tokens_per_cycle == alone.stats.tokens_per_cycle > 1.2


def refusal(engine: Engine, schedule: str) -> str:
    with pytest.raises(RequestError) as caught:
        engine.generate([[1, 2]], replace(GREEDY, schedule=schedule))
    assert caught.value.param == "schedule"
    return str(caught.value)


def test_a_schedule_that_cannot_run_is_refused(engine: Engine, checkpoint: Path, tiny_qwen3: Path) -> None:
    assert refusal(engine, "eagle") == "schedule must be one of auto, orthrus, ngram, ar, got 'eagle'"
    assert "to allow it, set the engine's schedule to 'medusa'" in refusal(engine, "medusa")
    set_to_ar = Engine.from_pretrained(EngineConfig(model=str(checkpoint), schedule="ar"))
    assert refusal(set_to_ar, "orthrus") == (
        "schedule must be one of auto, ar, got 'orthrus': to allow it, set the engine's schedule to 'orthrus'"
    )
    plain = Engine.from_pretrained(EngineConfig(model=str(tiny_qwen3)))
    assert refusal(plain, "orthrus") == (
        "schedule must be one of auto, ngram, ar, got 'orthrus': the model lacks the weights for it"
    )
    [[answer]] = plain.generate([[1, 2]], replace(GREEDY, schedule="ar"))
    assert len(answer.token_ids) == 40
