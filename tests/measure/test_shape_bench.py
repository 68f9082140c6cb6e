"""The benchmark's replayed drafts: as right as wished, on a small shape; the measurements themselves need a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orthrus.errors import ConfigError
from orthrus.measure.contest import Ratio
from orthrus.measure.random_model import shape_config, shape_engine
from orthrus.measure.replay import agreement_for, replaying
from orthrus.measure.shape_bench import PassTime, ShapeBenchOptions, ShapeReport, Speed, plot, shape_bench
from orthrus.requests.request import SamplingParams

CPU = torch.device("cpu")
SMALL = replace(
    shape_config("0.6B"),
    vocab_size=500,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    block_size=8,
    mask_token_id=499,
)


def test_agreement_gives_the_tokens_per_cycle() -> None:
    for wanted in (1.5, 5.0, 10.6):
        chance = agreement_for(wanted, 32)
        assert sum(chance**depth for depth in range(32)) == pytest.approx(wanted)


def test_replayed_drafts_bring_what_is_asked_and_change_no_token() -> None:
    settings = {"kv_cache_tokens": 4096, "max_model_len": 512, "max_num_seqs": 8}
    ar = shape_engine(SMALL, "ar", CPU, torch.float32, **settings)
    orthrus = shape_engine(SMALL, "orthrus", CPU, torch.float32, **settings)
    schedule = replaying(orthrus, agreement_for(4.0, 8))
    prompts = [
        torch.randint(400, (30,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(6)
    ]
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=200, ignore_eos=True)
        for i in range(len(prompts))
    ]
    expected = ar.generate(prompts, params)
    for prompt, one, [completion] in zip(prompts, params, expected, strict=True):
        schedule.learn(prompt, one, completion.token_ids)
    got = orthrus.generate(prompts, params)
    assert [c.token_ids for [c] in got] == [c.token_ids for [c] in expected]
    assert 3.8 < orthrus.stats.tokens_per_cycle < 4.2
    assert len({token for [c] in expected for token in c.token_ids}) > 150, "such text proves little"


def test_a_report_reads_as_text_json_and_picture(tmp_path: Path) -> None:
    ratio = Ratio(4.5, 4.4, 4.6)
    report = ShapeReport(
        shape="8B",
        hardware="a GPU",
        torch="2.13",
        context=1024,
        new_tokens=128,
        read_gbps=4400.0,
        passes=(PassTime("ar step, batch 1", 4.1, 0.84),),
        speeds=(Speed("orthrus", 1, 1100.0, ratio, None, 10.6), Speed("ar", 1, 240.0, ratio, ratio, 1.0)),
        exact=False,
        weights_gib=17.9,
        memory_over=0.04,
    )
    text = report.to_text()
    assert "84% of the bandwidth" in text and "4.50x (4.40-4.60)" in text and "DIFFER" in text
    assert json.loads(report.to_json())["passes"][0]["milliseconds"] == 4.1
    plot(report, tmp_path / "bench.svg")
    assert (tmp_path / "bench.svg").stat().st_size > 5000


def test_unknown_shapes_and_machines_without_a_gpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="use one of"):
        shape_config("9B")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="GPU"):
            shape_bench(ShapeBenchOptions())
