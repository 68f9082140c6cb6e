"""Tensor parallelism on two GPUs: the exchange against its reference, and the bits of an engine on one GPU."""

import gc
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two GPUs", allow_module_level=True)

from torch.multiprocessing.spawn import spawn

from orthrus.engine import Engine, EngineConfig
from orthrus.kernels.linear.add_rms_norm import add_rms_norm
from orthrus.kernels.ranks.peer_memory import PeerMemory, PeerSizes
from orthrus.requests.request import SamplingParams
from tests.checkpoints import make_checkpoint

WIDTH = 8192
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


def _exchange(rank: int, store_file: str) -> None:
    device = torch.device("cuda", rank)
    peers = PeerMemory(rank, 2, device, store_file, PeerSizes(512, WIDTH, 8, 1024, 64))
    generator = torch.Generator(device).manual_seed(0)
    for rows in (1, 7, 32, 64, 512):
        for parts in (1, 2):
            sums = torch.randn(2, parts, rows, WIDTH, device=device, generator=generator)
            residual = torch.randn(rows, WIDTH, device=device, generator=generator).bfloat16()
            norm = torch.randn(WIDTH, device=device, generator=generator).bfloat16()
            expected = add_rms_norm(sums.flatten(0, 1), residual, norm, 1e-6)
            for _ in range(3):  # Both sets of boxes, and the first one again.
                found = add_rms_norm(sums[rank], residual, norm, 1e-6, peers=peers)
                assert all(map(torch.equal, found, expected)), (rows, parts)
    assert int(peers.status[0]) == 0


def test_the_exchange_adds_as_one_gpu_does(tmp_path: Path) -> None:
    spawn(_exchange, (str(tmp_path / "ranks"),), nprocs=2)


@pytest.mark.parametrize("settings", [{}, {"draft_tree": 16}, {"draft_weights": "fp8"}], ids=str)
def test_two_gpus_give_the_bits_of_one(tmp_path: Path, settings: dict[str, object]) -> None:
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
    results, tokens_per_cycle = [], []
    for size in (1, 2):
        config = {
            "model": str(path),
            "device": "cuda",
            "tensor_parallel_size": size,
            "kv_cache_tokens": 8192,
            "prefill_chunk": 64,
            "max_num_seqs": 8,
            "adaptive_draft": False,
            "draft_weights": "same",
        }
        engine = Engine.from_pretrained(EngineConfig.model_validate(config | settings))
        found = [completion for [completion] in engine.generate(PROMPTS, PARAMS)]
        results.append([(completion.token_ids, completion.logprobs) for completion in found])
        tokens_per_cycle.append(engine.stats.committed / engine.stats.cycles)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    assert results[0] == results[1]
    assert min(tokens_per_cycle) > 1.1
