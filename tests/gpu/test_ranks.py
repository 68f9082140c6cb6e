"""Tensor parallelism on 2, 4 and 8 GPUs, as far as available: the exchange against its reference, and the bits of one GPU.

test_bits.py compares many tokens at the widths of Qwen3-8B.
"""

import gc
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

from torch.multiprocessing.spawn import spawn

from orthrus.engine import EngineConfig
from orthrus.kernels.device import has_warpgroup_mma
from orthrus.kernels.linear.add_rms_norm import add_rms_norm
from orthrus.kernels.peer_sizes import PeerSizes
from orthrus.kernels.ranks import add_pairwise
from orthrus.kernels.ranks.collective import Backend
from orthrus.kernels.ranks.peer_memory import PeerMemory
from orthrus.requests.request import SamplingParams, TokenLogprob
from tests.checkpoints import make_checkpoint
from tests.ranks import engine_over

Result = tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]
SIZES = [size for size in (2, 4, 8) if size <= torch.cuda.device_count()]
WIDTH = 8192
SETTINGS: list[dict[str, object]] = [{}, {"draft_tree": 16}, {"draft_weights": "fp8"}]
SETTINGS += [{"draft_weights": "int4"}] if has_warpgroup_mma() else []
PROMPTS = [[(7 * i * j + 3) % 500 + 1 for j in range(5 + 11 * i)] for i in range(8)]
PARAMS = [
    SamplingParams(
        temperature=float(i % 2),
        seed=i,
        max_tokens=60,
        ignore_eos=True,
        logprobs=2 if i % 3 else None,
        top_p=0.9 if i % 4 == 1 else 1.0,
    )
    for i in range(8)
]


def _exchange(rank: int, size: int, store_file: str) -> None:
    device = torch.device("cuda", rank)
    peers = PeerMemory(rank, size, device, store_file, PeerSizes(512, WIDTH, 8, 1024, 64))
    generator = torch.Generator(device).manual_seed(0)
    for rows in (1, 7, 32, 64, 512):
        for parts in (1, 2, 4):
            sums = torch.randn(size, parts, rows, WIDTH, device=device, generator=generator)
            residual = torch.randn(rows, WIDTH, device=device, generator=generator).bfloat16()
            norm = torch.randn(WIDTH, device=device, generator=generator).bfloat16()
            # First the parts of each rank are added, and then the sums of the ranks.
            whole = add_pairwise([add_pairwise(own.unbind()) for own in sums])
            expected = add_rms_norm(whole[None], residual, norm, 1e-6)
            for _ in range(3):  # This uses both sets of boxes, and the first one again.
                found = add_rms_norm(sums[rank], residual, norm, 1e-6, peers=peers)
                assert all(map(torch.equal, found, expected)), (rows, parts)
    assert int(peers.status[0]) == 0


@pytest.mark.parametrize("size", SIZES)
def test_the_exchange_adds_as_one_gpu_does(tmp_path: Path, size: int) -> None:
    spawn(_exchange, (size, str(tmp_path / "ranks")), nprocs=size)


def results(
    size: int,
    prompts: list[list[int]],
    params: list[SamplingParams],
    settings: dict[str, object],
    backend: Backend | None = None,
) -> tuple[list[Result], float]:
    """Tokens and logprobs of each prompt on `size` GPUs, and tokens per cycle. backend: see `start_ranks`."""
    config = {
        "device": "cuda",
        "tensor_parallel_size": size,
        "sum_leaves": SIZES[-1],
        "adaptive_draft": False,
        "draft_weights": "same",
    }
    engine = engine_over(EngineConfig.model_validate(config | settings), backend)
    found = [completion for [completion] in engine.generate(prompts, params)]
    tokens_per_cycle = engine.stats.committed / engine.stats.cycles
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    return [(completion.token_ids, completion.logprobs) for completion in found], tokens_per_cycle


def small_model(tmp_path: Path) -> dict[str, object]:
    """Settings of an engine of two layers with the widths of a small Qwen3."""
    path = make_checkpoint(
        tmp_path,
        vocab_size=600,
        hidden_size=1024,
        intermediate_size=3072,
        heads=16,
        kv_heads=8,
        head_dim=128,
        noise=0.02,
        max_position_embeddings=1024,
        initializer_range=0.03,
        dtype=torch.bfloat16,
    )
    return {
        "model": str(path),
        "kv_cache_tokens": 8192,
        "prefill_chunk": 64,
        "max_num_seqs": 8,
    }


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_several_gpus_give_the_bits_of_one(tmp_path: Path, settings: dict[str, object]) -> None:
    fixed = small_model(tmp_path)
    alone, tokens_per_cycle = results(1, PROMPTS, PARAMS, fixed | settings)
    assert tokens_per_cycle > 1.1
    for size in SIZES:
        shared, tokens_per_cycle = results(size, PROMPTS, PARAMS, fixed | settings)
        assert shared == alone, f"{size} GPUs"
        assert tokens_per_cycle > 1.1


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gpus_that_exchange_over_nccl_give_the_bits_of_one(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    """NCCL is for GPUs that can't reach each other's memory."""
    fixed = small_model(tmp_path) | settings
    alone, _ = results(1, PROMPTS, PARAMS, fixed)
    shared, tokens_per_cycle = results(2, PROMPTS, PARAMS, fixed, "nccl")
    assert shared == alone
    assert tokens_per_cycle > 1.1
