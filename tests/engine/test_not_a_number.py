"""Scores that are NaN or infinite end the request that has them with an error, and cost no other request anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import orthrus
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.models.checkpoint import load_weights
from orthrus.models.families import load_config
from orthrus.requests.request import Chunk, Request, SamplingParams, joined_chunks
from orthrus.runner.eager import EagerRunner
from tests.checkpoints import make_checkpoint

NAN = float("nan")
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.8, seed=7, max_tokens=30, ignore_eos=True),
    "filtered": SamplingParams(temperature=0.8, seed=7, top_p=0.9, top_k=30, max_tokens=30, ignore_eos=True),
    "min_p": SamplingParams(temperature=0.8, seed=7, min_p=0.05, max_tokens=30, ignore_eos=True),
    "penalised": SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=30, ignore_eos=True),
    "logprobs": SamplingParams(temperature=0.0, logprobs=3, max_tokens=30, ignore_eos=True),
}
RUNNERS = ("ar", "orthrus", "ahead")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("nan") / "model", tie=False, noise=0.02)


def engine_of(path: Path, runner: str, damage: Callable[[dict[str, Tensor]], object]) -> Engine:
    """An engine whose weights were damaged after loading. runner: "ahead" launches passes on unknown tokens."""
    config = EngineConfig(
        model=str(path),
        schedule="ar" if runner == "ar" else "orthrus",
        adaptive_draft=False,
        kv_cache_tokens=4096,
        device="cpu",
    )
    model = load_config(path)
    weights = load_weights(path, model, "cpu", "auto")
    damage(weights)
    engine = Engine(config, model, weights)
    if runner == "ahead":
        engine.use_runner(EagerRunner(engine.forward, engine.cache, feeds_tokens=True))
    return engine


def run(engine: Engine, *requests: Request) -> list[Chunk]:
    chunks: dict[str, list[Chunk]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for chunk in engine.step():
            chunks[chunk.request_id].append(chunk)
    return [joined_chunks(parts) for parts in chunks.values()]


@pytest.mark.parametrize("kind", PARAMS)
def test_a_request_ends_at_the_first_scores_that_are_not_numbers(path: Path, kind: str) -> None:
    params, prompts = PARAMS[kind], [[3, 1, 4, 1, 5], [9, 2, 6]]
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    clean = run(engine_of(path, "ar", lambda weights: None), *requests)
    first, second = (list(chunk.token_ids) for chunk in clean)
    # A token that only the first text has. After it, scores are not numbers.
    bad = next(t for t in first[3:] if t not in second and t not in [*prompts[0], *prompts[1]])
    for runner in RUNNERS:
        engine = engine_of(path, runner, lambda weights: weights["model.embed_tokens.weight"][bad].fill_(NAN))
        ended, whole, refused = run(engine, *requests, Request("bad", [1, 2, bad], params))
        assert list(ended.token_ids) == first[: first.index(bad) + 1], runner
        assert (ended.finish_reason, ended.error_param) == ("error", None)
        assert ended.error is not None and "NaN or infinite" in ended.error
        assert ended.stats is not None
        assert list(whole.token_ids) == second
        assert whole.finish_reason == "length"
        assert (refused.token_ids, refused.finish_reason) == ((), "error")
        # Other requests do not use what the failed ones have left in the cache.
        (again,) = run(engine, requests[1])
        assert list(again.token_ids) == second
        assert engine.stats.kv_pages_used == 0


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_single_score_that_is_not_a_number_is_enough(path: Path, value: float) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["lm_head.weight"][77].fill_(value)

    for params in PARAMS.values():
        (chunk,) = run(engine_of(path, "orthrus", damage), Request("a", [1, 2, 3], params))
        # Of infinite weights, some scores are -inf: such a token is never picked.
        assert chunk.finish_reason == "error" or (value > 0 and 77 not in chunk.token_ids)


def test_a_diffusion_view_without_numbers_drafts_nothing(path: Path) -> None:
    def damage(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.self_attn.o_proj_diff.weight"].fill_(NAN)

    request = Request("a", [3, 1, 4], PARAMS["greedy"])
    (clean,) = run(engine_of(path, "ar", lambda weights: None), request)
    for runner in ("orthrus", "ahead"):
        engine = engine_of(path, runner, damage)
        (chunk,) = run(engine, request)
        assert (chunk.token_ids, chunk.finish_reason) == (clean.token_ids, "length")
        assert engine.stats.tokens_per_cycle == 1.0


def test_generate_raises(path: Path) -> None:
    module = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    settings: dict[str, Any] = {"kv_cache_tokens": 1024, "device": "cpu", "schedule": "ar"}
    with pytest.warns(UserWarning, match="without the diffusion weights"):
        model = orthrus.accelerate(module, **settings)
    with torch.no_grad():
        model.engine.forward._embedding[5] = NAN
    with pytest.raises(RuntimeError, match=r"generate: the model's scores .* are NaN or infinite"):
        model.generate(torch.tensor([[1, 2, 5]]), max_new_tokens=3)
    assert not model.engine.has_work
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape == (1, 5)
    with torch.no_grad():
        module.model.embed_tokens.weight[5] = 0.0
        module.model.norm.weight[0] = NAN
    with (
        pytest.warns(UserWarning, match="without the diffusion weights"),
        pytest.raises(ValueError, match=r"model\.norm\.weight holds values that are NaN"),
    ):
        orthrus.accelerate(module, **settings)


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("prompt", [[1, 5, 2, 3], [1, 2, 3, 5]], ids=["within", "at the end"])
def test_a_prompt_without_numbers_is_not_scored(path: Path, prompt: list[int], max_tokens: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, prompt_logprobs=2)
    for runner in RUNNERS:
        engine = engine_of(path, runner, lambda weights: weights["model.embed_tokens.weight"][5].fill_(NAN))
        refused, whole = run(engine, Request("bad", prompt, params), Request("good", [1, 2, 3], params))
        assert (refused.token_ids, refused.finish_reason) == ((), "error")
        assert refused.error is not None and "NaN or infinite" in refused.error
        assert whole.finish_reason == "length" and whole.prompt_logprobs is not None
        assert len(whole.prompt_logprobs) == 2
        assert engine.stats.kv_pages_used == 0
