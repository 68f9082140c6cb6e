"""Weights in 12 bits in an engine: what the settings mean, what memory they take, and drafts from 8 of the 12 bits."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus.engine import Engine
from orthrus.engine.config import EngineConfig
from orthrus.engine.draft_weights import auto_draft_format, check_draft_weights, copies_bytes, reads_one_plane
from orthrus.engine.sizing import choose_weight_format
from orthrus.errors import ConfigError
from orthrus.models.families import load_config
from orthrus.models.quantization import read_quantization
from orthrus.models.shapes import QWEN3_SHAPES
from orthrus.models.shard import Shard
from orthrus.models.sizes import CopyBytes, weight_bytes
from orthrus.requests.request import SamplingParams
from tests.conftest import ROOT
from tests.quantised import AWQ

TINY = ROOT / "models" / "orthrus-tiny"
CUDA = torch.device("cuda")


def engine(path: Path, **settings: Any) -> Engine:
    fixed = {"model": str(path), "device": "cpu", "adaptive_draft": False, "kv_cache_tokens": 4096}
    return Engine.from_pretrained(EngineConfig.model_validate(fixed | settings))


def test_drafts_from_8_bits_are_as_good_as_drafts_by_the_same_weights() -> None:
    beginnings = ("def main():\n", "import os\n\ndef load_config(path):\n", "with open(path) as f:\n")
    found, per_cycle = [], []
    for settings in (
        {"schedule": "ar"},
        {"schedule": "orthrus"},
        {"schedule": "orthrus", "weights": "lossless12", "draft_weights": "lossless8"},
    ):
        ours = engine(TINY, **settings)
        prompts = [ours.tokenizer.encode(text) for text in beginnings]
        texts = []
        for temperature in (0.0, 0.7):
            params = SamplingParams(temperature=temperature, max_tokens=32, seed=1, ignore_eos=True)
            texts += [[one.token_ids for one in each] for each in ours.generate(prompts, params)]
        found.append(texts)
        per_cycle.append(ours.stats.tokens_per_cycle)
    assert found[1] == found[0] and found[2] == found[0]
    _, same, plane = per_cycle
    assert same is not None and plane is not None
    assert same > 2.5 and plane >= 0.95 * same, (same, plane)


def test_a_cpu_keeps_weights_in_full_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ours = engine(TINY, weights="lossless12")
    assert "lossless12 has no effect on a CPU" in caplog.text
    assert ours.forward.exact.nbytes == engine(TINY).forward.exact.nbytes


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="set weights to lossless12"):
        EngineConfig(model="m", draft_weights="lossless8")
    config, model = EngineConfig(model="m", weights="lossless12"), QWEN3_SHAPES["8B"]
    assert choose_weight_format(config, model, CUDA, torch.bfloat16) == "lossless12"
    with pytest.raises(ConfigError, match="set dtype to bfloat16"):
        choose_weight_format(config, model, CUDA, torch.float16)
    assert choose_weight_format(EngineConfig(model="m"), model, CUDA, torch.bfloat16) == "plain"
    quantised = replace(model, quantization=read_quantization({"quantization_config": AWQ}))
    with pytest.raises(ConfigError, match="is quantised"):
        config.check_model(quantised)


@pytest.mark.parametrize(("shape", "least", "most"), [("8B", 0.75, 0.78), ("32B", 0.75, 0.77)])
def test_the_memory_of_12_bits_is_counted(shape: str, least: float, most: float) -> None:
    model = QWEN3_SHAPES[shape]
    assert least < weight_bytes(Shard(model), 2, lossless=True) / weight_bytes(Shard(model), 2) < most
    drafting = replace(model, block_size=32, mask_token_id=151669)
    packed = weight_bytes(Shard(drafting), 2, lossless=True)
    assert least < packed / weight_bytes(Shard(drafting), 2) < most
    assert (
        copies_bytes(Shard(drafting), 2, "fp8", lossless=True)
        == weight_bytes(Shard(drafting), 2, CopyBytes(1.001, 1.001), lossless=True) - packed
    )
    tied = replace(model, tie_word_embeddings=True)
    head = model.vocab_size * model.hidden_size
    extra = weight_bytes(Shard(tied), 2, lossless=True) - (
        weight_bytes(Shard(model), 2, lossless=True) - 2 * head
    )
    assert 1.9 * head < extra < 2.1 * head, "the embedding in full beside the head in 12 bits"


@pytest.mark.parametrize(
    "settings", [{"draft_weights": "fp8"}, {"draft_weights": "lossless8", "weights": "lossless12"}]
)
def test_drafts_in_fp8_need_a_gpu_that_multiplies_it(settings: dict[str, Any]) -> None:
    model = replace(QWEN3_SHAPES["8B"], block_size=32, mask_token_id=151669)
    config = EngineConfig.model_validate({"model": "m"} | settings)
    check_draft_weights(config, Shard(model), (8, 9))
    with pytest.raises(ConfigError, match="needs a GPU with FP8 tensor cores"):
        check_draft_weights(config, Shard(model), (8, 0))


def test_auto_drafts_read_8_bits_and_take_no_copies() -> None:
    model = replace(QWEN3_SHAPES["8B"], block_size=32, mask_token_id=151669)
    config = EngineConfig(model="m", max_model_len=4096, weights="lossless12")
    assert reads_one_plane(config, model) and auto_draft_format(config, Shard(model), 2, 1e12, (9, 0)) is None
    for other in ({"draft_weights": "same"}, {"schedule": "ar"}, {"draft_lead": True}):
        assert not reads_one_plane(config.model_copy(update=other), model)
    assert load_config(TINY).has_diffusion
