"""A new runner is one file and one line of the registry; machines without Triton never load the one for GPUs."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from orthrus.cache.kv_cache import KVCache
from orthrus.engine import Engine, EngineConfig
from orthrus.models.forward import LayerParallelForward
from orthrus.plan import RowGroup
from orthrus.requests.request import SamplingParams
from orthrus.runner.eager import EagerRunner
from orthrus.runner.protocol import LaunchedPass, RunnerLimits
from orthrus.runner.registry import RUNNERS, RunnerEntry, load_runner
from orthrus.runner.sampler import PickRows
from tests.checkpoints import make_checkpoint


class CountingRunner(EagerRunner):
    """Counts its passes, and keeps what it was told to make room for."""

    passes = 0

    def __init__(self, forward: LayerParallelForward, cache: KVCache, room: tuple[int, int, int]) -> None:
        super().__init__(forward, cache)
        self.room = room

    @staticmethod
    def build(forward: LayerParallelForward, cache: KVCache, limits: RunnerLimits) -> "CountingRunner":
        return CountingRunner(forward, cache, (limits.max_rows, limits.max_logits, limits.max_pages))

    def launch(self, groups: Sequence[RowGroup], rows: Sequence[PickRows]) -> LaunchedPass:
        self.passes += 1
        return super().launch(groups, rows)


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cpu", torch.float32, "EagerRunner"),
        ("cpu", torch.float64, "EagerRunner"),
        ("cuda", torch.float64, "EagerRunner"),
        ("cuda", torch.bfloat16, "CudaGraphRunner"),
        ("cuda", torch.float32, "CudaGraphRunner"),
    ],
)
def test_the_device_and_the_dtype_choose(device: str, dtype: torch.dtype, name: str) -> None:
    if name == "CudaGraphRunner":
        pytest.importorskip("triton")
    factory = load_runner(torch.device(device), dtype)
    assert isinstance(factory, type) and factory.__name__ == name


def test_an_engine_uses_a_registered_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        model=str(make_checkpoint(tmp_path / "model", diffusion=False)),
        kv_cache_tokens=2048,
        max_model_len=100,
        max_num_seqs=3,
        prefill_chunk=7,
        device="cpu",
        schedule="ar",
    )
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    [[expected]] = Engine.from_pretrained(config).generate([[1, 2, 3]], params)

    entry = RunnerEntry(f"{__name__}:CountingRunner", fits=lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr("orthrus.runner.registry.RUNNERS", [entry, *RUNNERS])
    engine = Engine.from_pretrained(config)
    assert isinstance(engine.runner, CountingRunner)
    # A page is 16 tokens, so a context is 7 pages.
    assert engine.runner.room == (engine.limits.max_rows, engine.limits.max_logits, 3 * 7)
    before = engine.runner.passes
    [[completion]] = engine.generate([[1, 2, 3]], params)
    assert completion.token_ids == expected.token_ids
    assert engine.runner.passes == before + 20


def test_an_engine_on_a_cpu_never_loads_the_runner_of_gpus() -> None:
    code = (
        "import sys, torch, orthrus.engine.core\n"
        "from orthrus.runner.registry import load_runner\n"
        "load_runner(torch.device('cpu'), torch.float32)\n"
        "assert 'orthrus.runner.cuda_graphs' not in sys.modules\n"
        "assert 'orthrus.runner.eager' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
