"""`orthrus compare --shape` on a small shape on a CPU: all methods run, and drafts are right as often as asked."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orthrus.cli import main
from orthrus.errors import ConfigError
from orthrus.measure.acceptance import chain_profile
from orthrus.measure.compare_shape import ShapeCompareOptions, ShapeCompareReport, compare_shape, plot
from orthrus.measure.random_model import shape_config, shape_engine
from orthrus.measure.replay import ReplaySchedule
from orthrus.models.medusa_config import MedusaConfig
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.requests.request import SamplingParams
from orthrus.schedules.medusa import MedusaSchedule
from orthrus.schedules.planner import DraftPlanner

SMALL = replace(
    QWEN3_SHAPES["0.6B"],
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(QWEN3_SHAPES, "small", SMALL)


def test_all_methods_decode_side_by_side(tmp_path: Path) -> None:
    options = ShapeCompareOptions(
        "small", "cpu", batches=(1, 2), context=96, new_tokens=24, rounds=1, tokens_per_cycle=6.0
    )
    report = compare_shape(options)
    names = ["ar", "orthrus", "medusa", "fp8", "int8", "int4"]
    assert [method.name for method in report.methods] == names
    assert [(s.batch, s.contestant) for s in report.speeds] == [(b, name) for b in (1, 2) for name in names]
    assert report.exact and all(speed.tokens_per_second > 0 for speed in report.speeds)
    sizes = {method.name: method.weights_gib for method in report.methods}
    assert sizes["int4"] < sizes["fp8"] < sizes["ar"] < sizes["orthrus"] < sizes["medusa"]
    [sparse] = report.left_out
    assert sparse.startswith("2:4 is not timed") and sparse in report.to_text()
    assert "replayed at 2.5 tokens per cycle" in report.to_text()
    assert json.loads(report.to_json())["methods"][2]["name"] == "medusa"
    plot(report, tmp_path / "compare.svg")
    assert "<svg" in (tmp_path / "compare.svg").read_text()


def test_replayed_heads_give_the_tokens_per_cycle_asked_for_and_change_no_token() -> None:
    model = shape_config("small", diffusion=False)
    settings = {"kv_cache_tokens": 4096, "max_model_len": 512, "max_num_seqs": 8}
    engine = shape_engine(
        model, "ar", torch.device("cpu"), torch.float32, medusa=MedusaConfig.of(model, 4, False), **settings
    )
    prompts = [
        torch.randint(400, (30,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)
    ]
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=150, ignore_eos=True) for i in range(4)]
    expected = engine.generate(prompts, params)
    for wanted in (1.5, 2.5):
        medusa = MedusaSchedule(DraftPlanner(5, None, 512, lead=False), 4)
        schedule = ReplaySchedule(medusa, model.vocab_size, [chain_profile(wanted, 5)])
        for prompt, one, [completion] in zip(prompts, params, expected, strict=True):
            schedule.learn(prompt, one, completion.token_ids)
        engine.use_schedule(schedule)
        got = engine.generate(prompts, params)
        assert [c.token_ids for [c] in got] == [c.token_ids for [c] in expected]
        stats = [c.stats for [c] in got]
        per_cycle = sum(s.completion_tokens - 1 for s in stats) / sum(s.cycles for s in stats)
        assert per_cycle == pytest.approx(wanted, rel=0.08)


def test_the_command_prints_json_and_refuses_an_unknown_shape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = ["--device", "cpu", "--batch", "1", "--context", "70", "--new-tokens", "4", "--rounds", "1"]
    assert main(["compare", "--shape", "small", "--json", "--shared-projection", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {speed["contestant"] for speed in found["speeds"]} >= {"ar", "orthrus", "medusa", "int4"}
    assert set(found) == set(ShapeCompareReport.__dataclass_fields__)
    with pytest.raises(ConfigError, match="use one of"):
        compare_shape(ShapeCompareOptions("9B", "cpu"))
