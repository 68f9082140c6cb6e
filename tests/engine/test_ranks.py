"""Tensor parallelism on a CPU: several processes share a model, and give the bits of one."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus.engine import Engine, EngineConfig
from orthrus.engine.rank_processes import HANG_SECONDS
from orthrus.errors import CheckpointError, ConfigError
from orthrus.kernels.ranks import RankError
from orthrus.requests.request import Request, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.imports import ROOT
from tests.ranks import running_ranks

PROMPTS = [[5, 9, 2, 40, 7], [101, 3], list(range(30, 130))]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=24, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=24, logprobs=0, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=4, top_p=0.9, max_tokens=16, logprobs=1, ignore_eos=True),
]

THREADS = 2
"""Of this process before an engine starts. More than there are cores would wait for each other."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be divided among up to 8 ranks, with weights that some ranks can hold in 16 bits and others can't."""
    return make_checkpoint(
        tmp_path_factory.mktemp("ranks"),
        vocab_size=600,
        hidden_size=64,
        intermediate_size=1100,
        heads=16,
        kv_heads=8,
        head_dim=64,
        tie=False,
        bias=True,
        noise=0.02,
        dtype=torch.bfloat16,
    )


def load(checkpoint: Path, size: int, **settings: object) -> Engine:
    config = {
        "model": str(checkpoint),
        "device": "cpu",
        "tensor_parallel_size": size,
        "sum_leaves": 8,
        "kv_cache_tokens": 512,
        "max_num_seqs": 4,
        "prefill_chunk": 32,
        "adaptive_draft": False,
    }
    return Engine.from_pretrained(EngineConfig.model_validate(config | settings))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """An engine of several ranks shares the threads among them, and gives them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    gc.collect()
    end = time.monotonic() + 10  # Another thread may be collecting garbage.
    while torch.get_num_threads() != THREADS:
        assert time.monotonic() < end, "the threads of an engine that has ended are not given back"
        time.sleep(0.01)
    torch.set_num_threads(before)


def results(engine: Engine) -> tuple[list[object], float]:
    """Tokens and logprobs of each request, and tokens per cycle."""
    completions = [found for [found] in engine.generate(PROMPTS, PARAMS)]
    stats = engine.stats
    return [(c.token_ids, c.logprobs) for c in completions], stats.committed / stats.cycles


def results_alone(checkpoint: Path, **settings: object) -> tuple[list[object], float]:
    """`results` of one rank and one thread, which is the quickest for so small a model. The number of threads changes no bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return results(load(checkpoint, 1, **settings))
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def of_one_rank(checkpoint: Path) -> tuple[list[object], float]:
    return results_alone(checkpoint)


def run_to_the_end(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("settings", [{}, {"draft_tree": 8}, {"draft_weights": "fp8"}], ids=str)
def test_two_ranks_give_the_bits_of_one(
    checkpoint: Path, of_one_rank: tuple[list[object], float], settings: dict[str, object]
) -> None:
    """Chains, trees whose pages are copied on all ranks, and drafts with weights of their own."""
    alone, expected = results_alone(checkpoint, **settings) if settings else of_one_rank
    shared, tokens_per_cycle = results(load(checkpoint, 2, **settings))
    assert shared == alone
    assert tokens_per_cycle > 1.5
    if not settings.get("draft_weights"):
        assert tokens_per_cycle == expected


def test_two_ranks_draft_in_4_bits(tmp_path: Path) -> None:
    """A rank scales outputs by its own part of a row, so drafts differ a little. The text does not."""
    path = make_checkpoint(
        tmp_path,
        vocab_size=600,
        hidden_size=128,
        intermediate_size=256,
        heads=8,
        kv_heads=2,
        head_dim=32,
        bias=True,
        noise=0.02,
    )
    alone, expected = results_alone(path, draft_weights="int4", sum_leaves=2)
    shared, tokens_per_cycle = results(load(path, 2, draft_weights="int4", sum_leaves=2))
    assert shared == alone
    assert min(expected, tokens_per_cycle) > 1.3


@pytest.mark.parametrize("size", [4, 8])
def test_more_ranks_give_the_bits_of_one(
    checkpoint: Path, of_one_rank: tuple[list[object], float], size: int
) -> None:
    alone, expected = of_one_rank
    assert results(load(checkpoint, size)) == (alone, expected)
    assert expected > 1.5


@pytest.mark.parametrize(
    ("sign", "said"), [(signal.SIGKILL, "killed by signal 9"), (signal.SIGSTOP, "stopped")]
)
def test_a_rank_that_ends_or_stops_ends_the_engine(checkpoint: Path, sign: signal.Signals, said: str) -> None:
    engine = load(checkpoint, 2, max_model_len=512)
    engine.submit(
        Request("long", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True))
    )
    engine.step()
    [process] = running_ranks()
    assert process.pid is not None
    os.kill(process.pid, sign)
    begin = time.monotonic()
    with pytest.raises(RankError, match=rf"rank 1 .* {said}"):
        run_to_the_end(engine)
    assert time.monotonic() - begin < HANG_SECONDS + 1


def test_an_error_that_only_another_rank_finds_keeps_its_class_and_names_the_rank(
    checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.gate_proj.weight"][-1, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"^rank 1: .*gate_proj.*NaN"):
        load(tmp_path / "broken", 2)


def wait_for_file(file: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"no file {file.name} after {seconds} s"
        time.sleep(0.05)


def test_a_rank_notices_that_rank_0_has_been_killed(tmp_path: Path) -> None:
    command = f"from tests.engine.lone_rank import start_looking; start_looking({str(tmp_path)!r})"
    rank_0 = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT)
    try:
        wait_for_file(tmp_path / "begun", 60)
    finally:
        rank_0.kill()
        rank_0.wait()
    wait_for_file(tmp_path / "told", 10)
    assert (tmp_path / "told").read_text() == "rank 0 of the model has ended"


def test_numbers_of_ranks_that_cannot_share_a_model_are_refused(checkpoint: Path, tiny_orthrus: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't be shared by 8 ranks, .*: set .* to 1$"):
        load(tiny_orthrus, 4)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel_size 4 needs sums of 4 leaves, .* set sum_leaves to 4"
    ):
        load(checkpoint, 4, sum_leaves=2)
