"""`make bench-ranks` on a small shape, with ranks on the CPU. The times mean nothing there."""

import subprocess
import sys
from dataclasses import replace

import torch

from orthrus.measure.random_model import shape_config
from tests.gpu.ranks_bench import Figure, parts, speed_up
from tests.imports import ROOT

SMALL = replace(
    shape_config("0.6B", diffusion=False),
    vocab_size=512,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    sum_leaves=2,
)


def test_a_step_is_timed_on_one_rank_and_on_two() -> None:
    alone, shared, ratio = speed_up(SMALL, 2, 2, torch.device("cpu"), torch.float32)
    assert alone > 0 and shared > 0 and ratio == alone / shared


def test_every_part_has_a_name_and_a_figure_shows_its_bar() -> None:
    assert [*parts(2)] == ["exchange", "8B", "32B", "72B", "8B-ratio"]
    assert str(Figure("8B: 2 GPUs over one", 1.5, "x", 1.4, 1.65)).endswith("1.50 x   bar 1.4, reach 1.65")


def test_too_few_gpus_are_reported() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.ranks_bench", "8"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 or torch.cuda.device_count() >= 8
    assert "8 GPUs are needed, and there are" in done.stderr
