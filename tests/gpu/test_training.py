"""Training on a GPU: flex attention against the two-part form that CPUs use, and its memory at the paper's size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from torch import Tensor

from orthrus.models.config import ModelConfig
from orthrus.training.attention import draft_attention
from orthrus.training.base import BaseSettings, train_base
from orthrus.training.batches import TokenStream
from orthrus.training.blocks import DraftBlocks, draft_blocks, random_anchors
from orthrus.training.distributed import Processes
from orthrus.training.heads import HeadsSettings, train_heads
from orthrus.training.model import TwoViewModel, initialise, load_frozen
from tests.checkpoints import make_checkpoint


def make_inputs(
    batch: int, heads: int, kv_heads: int, dim: int, length: int, rows: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Queries, AR keys and values, own keys and values."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, rows, dim)] + [(batch, kv_heads, length, dim)] * 2
    shapes += [(batch, kv_heads, rows, dim)] * 2
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def make_blocks(batch: int, count: int, size: int, length: int, device: str) -> DraftBlocks:
    generator = torch.Generator().manual_seed(1)
    anchors = random_anchors(batch, count, length, size, generator)
    lengths = torch.randint(2, size + 1, anchors.shape, generator=generator)
    rows = torch.zeros(batch, length, dtype=torch.int64, device=device)
    return draft_blocks(rows, anchors.to(device), lengths.to(device), size, 0)


@pytest.mark.parametrize(("size", "length"), [(16, 1024), (32, 300), (12, 100)])
def test_flex_attention_has_the_values_and_gradients_of_the_two_parts(size: int, length: int) -> None:
    results = []
    for device in ("cpu", "cuda"):
        inputs = make_inputs(2, 6, 2, 64, length, 8 * size, torch.float32, device)
        attend = torch.compile(draft_attention) if device == "cuda" else draft_attention
        blocks = make_blocks(2, 8, size, length, device)
        out = attend(inputs[0], (inputs[1], inputs[2]), (inputs[3], inputs[4]), blocks)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        results.append([t.cpu() for t in (out, *gradients)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_the_papers_row_needs_no_memory_for_scores() -> None:
    # Qwen3-8B: 32 heads over 8, head_dim 128; 256 blocks of 32 rows over 2048 tokens.
    inputs = make_inputs(1, 32, 8, 128, 2048, 8192, torch.bfloat16, "cuda")
    blocks = make_blocks(1, 256, 32, 2048, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = torch.compile(draft_attention)(inputs[0], (inputs[1], inputs[2]), (inputs[3], inputs[4]), blocks)
    out.sum().backward()
    # Scores of one pass in bfloat16 would be 8192 x 10240 x 32 heads: 5 GB.
    assert torch.cuda.max_memory_allocated() - before < 1 << 30


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_training_learns_and_leaves_the_base_alone(tmp_path: Path, recompute: bool) -> None:
    base = make_checkpoint(tmp_path / "base", diffusion=False, hidden_size=64, dtype=torch.bfloat16)
    model = load_frozen(base, 16, 127, torch.device("cuda"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = HeadsSettings(
        steps=60, block_size=16, rows=8, row_length=128, anchors=8, lr=3e-3, recompute=recompute, log_every=10
    )
    text = TokenStream(np.arange(20_000) % 7, "a repeating text")
    train_heads(model, [(8, text)], settings, tmp_path, Processes())
    losses = [
        float(line.split('"kl": ')[1].split(",")[0])
        for line in (tmp_path / "heads.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < 0.7 * losses[0]
    for name, tensor in model.state_dict().items():
        trained = "_diff." in name
        assert tensor.dtype == (torch.float32 if trained else torch.bfloat16)
        assert torch.equal(tensor, before[name]) != trained, name


def test_a_compiled_base_learns_to_write(tmp_path: Path) -> None:
    config = ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    )
    model = TwoViewModel(config)
    initialise(model, seed=0)
    settings = BaseSettings(steps=100, rows=8, row_length=128, log_every=20, eval_every=50, eval_rows=4)
    text = TokenStream(np.arange(20_000) % 7, "a repeating text")
    train_base(model.cuda(), text, text, settings, tmp_path, Processes())
    lines = [json.loads(line) for line in (tmp_path / "base.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert last["loss"] < 0.1
    assert lines[-1]["held_out_loss"] < 0.1
