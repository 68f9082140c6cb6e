"""`orthrus verify` finds no drift where there is none, and finds it where there is."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from orthrus.cli import main
from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.errors import ConfigError
from orthrus.measure.drift import find_drifts, summarize
from orthrus.measure.hugging_face_check import KL_LIMIT, compare_hugging_face, kl_divergence
from orthrus.measure.verify import VerifyOptions, make_requests, run, verify, ways
from tests.checkpoints import make_checkpoint
from tests.schedules.test_medusa import add_heads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("orthrus"), noise=0.02)


def options_for(path: Path, *, tokens: int = 4000, max_tokens: int = 48, seed: int = 0) -> VerifyOptions:
    return VerifyOptions(
        str(path), tokens=tokens, max_tokens=max_tokens, max_batch=8, seed=seed, device="cpu"
    )


def engine_for(path: Path, schedule: Literal["auto", "ar"] = "auto") -> Engine:
    return Engine.from_pretrained(
        EngineConfig(model=str(path), device="cpu", schedule=schedule, adaptive_draft=False)
    )


def test_medusa_heads_beside_a_checkpoint_are_verified_too(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", diffusion=False, vocab_size=64)
    add_heads(path, path)
    report = verify(replace(options_for(path, tokens=1500), compare_hf=False))
    assert report.ok, report.to_text()
    checks = {check.name: check for check in report.checks}
    medusa = [checks[f"medusa {way}"] for way in ("alone", "mixed", "ahead")]
    assert all(check.tokens_per_cycle > 1.02 for check in medusa), report.to_text()
    assert checks["medusa mixed"].preemptions > 0
    assert "medusa adaptive" in checks


def test_drafts_in_4_bits_are_verified_where_the_model_has_groups_of_inputs(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, hidden_size=128, intermediate_size=256, heads=8, noise=0.02)
    report = verify(replace(options_for(path, tokens=2000), compare_hf=False))
    assert report.ok, report.to_text()
    checks = {check.name: check for check in report.checks}
    assert checks["orthrus int4 drafts"].tokens_per_cycle > 1.2


def test_no_drift(checkpoint: Path) -> None:
    report = verify(options_for(checkpoint, tokens=4000))
    assert report.ok, report.to_text()
    assert report.reference_tokens >= 260
    assert report.compared_tokens == 15 * report.reference_tokens
    checks = {check.name: check for check in report.checks}
    expected = {"ar alone", *(way.name for way in ways(has_diffusion=True))}
    assert set(checks) == expected - {"orthrus int4 drafts"}, "an MLP of 64 inputs has no groups of 128"
    assert "left out: orthrus int4 drafts: draft_weights 'int4' rounds" in report.to_text()
    for check in checks.values():
        assert (check.tokens, check.requests) == (report.reference_tokens, report.requests)
    # Equal text says nothing about the drafts: only tokens per cycle does.
    assert checks["ar alone"].tokens_per_cycle == checks["ar alone"].tokens_per_pass == 1.0
    assert checks["orthrus alone"].tokens_per_cycle > 1.2
    assert checks["orthrus lead"].tokens_per_cycle > 1.8
    assert checks["orthrus tree"].tokens_per_cycle > checks["orthrus lead"].tokens_per_cycle
    assert checks["orthrus tree ahead"].tokens_per_cycle > checks["orthrus alone"].tokens_per_cycle
    assert all(checks[f"ngram {way}"].tokens_per_cycle > 1.02 for way in ("alone", "mixed", "ahead"))
    assert checks["orthrus mixed"].preemptions > 0
    assert checks["orthrus mixed"].prefix_hit_tokens > 0
    assert report.hugging_face is not None
    assert report.hugging_face.positions == report.reference_tokens
    assert report.hugging_face.max_kl <= KL_LIMIT
    assert "zero drift" in report.to_text()


def test_drift_is_found_and_located(checkpoint: Path, tmp_path: Path) -> None:
    other = engine_for(make_checkpoint(tmp_path, seed=1))
    engine = engine_for(checkpoint)
    requests = list(itertools.islice(make_requests(engine, options_for(checkpoint)), 4))
    expected = run(engine, requests, itertools.repeat(1))
    got = run(other, requests, itertools.repeat(4))
    check = summarize("other", other, got, expected, seconds=1.0)
    assert check.drifted_tokens > 0
    assert check.drifted_logprobs > 0
    drifts = find_drifts("other", got, expected)
    assert {drift.request for drift in drifts} == {request.request_id for request in requests}
    assert all(drift.expected != drift.got for drift in drifts)
    assert not find_drifts("same", expected, expected)


def test_drift_in_the_last_bit_of_a_logprob_is_found(checkpoint: Path) -> None:
    engine = engine_for(checkpoint)
    requests = list(itertools.islice(make_requests(engine, options_for(checkpoint)), 1))
    expected = run(engine, requests, itertools.repeat(1))
    [(name, result)] = expected.items()
    last = result.logprobs[-1]
    moved = replace(last, logprob=last.logprob * (1 + 2**-52))
    got = {name: replace(result, logprobs=(*result.logprobs[:-1], moved))}
    check = summarize("moved", engine, got, expected, seconds=1.0)
    assert (check.drifted_tokens, check.drifted_logprobs) == (0, 1)
    [drift] = find_drifts("moved", got, expected)
    assert drift.position == len(result.token_ids) - 1


def test_a_wrong_forward_fails_against_hugging_face(checkpoint: Path, tmp_path: Path) -> None:
    engine = engine_for(checkpoint, "ar")
    requests = list(itertools.islice(make_requests(engine, options_for(checkpoint)), 2))
    results = run(engine, requests, itertools.repeat(1))
    assert compare_hugging_face(engine, checkpoint, requests, results).ok
    wrong = compare_hugging_face(engine, make_checkpoint(tmp_path, seed=1), requests, results)
    assert not wrong.ok
    assert wrong.max_kl > 0.1


def test_requests_are_a_function_of_the_seed(checkpoint: Path) -> None:
    engine = engine_for(checkpoint)
    first, second, third = (
        list(itertools.islice(make_requests(engine, options_for(checkpoint, seed=seed)), 20))
        for seed in (0, 0, 1)
    )
    assert first == second != third
    assert {request.params.greedy for request in first} == {True, False}
    assert len({len(request.prompt) for request in first}) > 5


def test_kl_is_the_divergence_and_keeps_small_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    q = torch.randn(3, 50, generator=generator, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl_divergence(p, q), expected)
    near = (
        p + 1e-9 * q
    )  # Second order: about half the variance of the gap, far below the rounding of log p - log q.
    assert ((kl_divergence(p, near) > 1e-20) & (kl_divergence(p, near) < 1e-17)).all()
    assert (kl_divergence(p, p) == 0).all()


def test_no_room_for_prompts_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--max-tokens 511 leaves no room"):
        verify(options_for(checkpoint, max_tokens=511))


def test_the_command_has_no_orthrus_checks_for_a_plain_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_checkpoint(tmp_path, diffusion=False))
    wanted = ["--device", "cpu", "--tokens", "240", "--max-tokens", "24", "--no-hf", "--json"]
    assert main(["verify", path, *wanted]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["ok"] is True
    assert report["compared_tokens"] >= 240
    names = [f"{name} {way}" for name in ("ar", "ngram") for way in ("alone", "mixed", "ahead")]
    assert [check["name"] for check in report["checks"]] == [*names, "ngram adaptive"]
    assert report["hugging_face"] is None
    assert "ngram mixed" in printed.err
