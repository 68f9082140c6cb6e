"""Requests, parameters and settings that can't work: the error says which one, and what to change."""

from pathlib import Path
from typing import Any

import pytest

from orthrus.engine import Engine
from orthrus.errors import RequestError
from orthrus.requests.request import Request, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine.test_engine import engine


@pytest.fixture(scope="module")
def ar(tiny_orthrus: Path) -> Engine:
    return engine(tiny_orthrus, "ar")


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], SamplingParams(), "at least one token"),
        ([1] * 512, SamplingParams(), "512 tokens"),
        ([128], SamplingParams(), "between 0 and 127"),
        ([1], SamplingParams(logit_bias={128: 1.0}), "logit_bias"),
        ([1], SamplingParams(stop=("x",)), "tokenizer"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_with_the_reason(
    ar: Engine, prompt: list[int], params: SamplingParams, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        ar.submit(Request("bad", prompt, params))
    assert not ar.has_work


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", -0.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("n", 0),
        ("stop", ("",)),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_settings_that_cannot_work_say_what_to_change(tiny_orthrus: Path, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", diffusion=False)
    assert engine(plain, "auto").schedule_name == "ngram"
    assert engine(plain, "auto", prompt_lookup_max=0).schedule_name == "ar"
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (plain, {}, "Orthrus checkpoint"),
        (tiny_orthrus, {"draft_length": 9}, "block_size 8"),
        (tiny_orthrus, {"max_model_len": 513}, "YaRN"),
        (tiny_orthrus, {"max_model_len": 100, "kv_cache_tokens": 64}, "kv_cache_tokens"),
    ]
    for path, settings, said in cases:
        with pytest.raises(ValueError, match=said):
            engine(path, **settings)


@pytest.mark.parametrize("schedule", ["ar", "orthrus"])
def test_a_tiny_temperature_picks_the_likeliest_tokens(tiny_orthrus: Path, schedule: str) -> None:
    """Logits over it stay finite."""
    ours = engine(tiny_orthrus, schedule)
    greedy, tiny = (
        ours.generate([[1, 2, 3]], SamplingParams(temperature=temperature, seed=1, max_tokens=12))
        for temperature in (0.0, 1e-30)
    )
    assert tiny[0][0].token_ids == greedy[0][0].token_ids
