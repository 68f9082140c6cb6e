"""Fixtures that several test modules share: tiny checkpoints, built once per run, read only."""

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports huggingface_hub, which reads them once: tests never wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Ray would start its workers at niceness 15. Beside other work, an answer could then take a minute.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter; it too is asked for once, where a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.checkpoints import make_checkpoint
from tests.reference import Reference

if TYPE_CHECKING:
    from orthrus.engine import Engine

ROOT = Path(__file__).resolve().parent.parent


_SERVERS = "tests/deployments/serving/"
"""The folder of tests that start Ray."""

_LONG = (
    "tests/training/test_training_run.py",
    "tests/engine/test_ranks.py",
    "tests/engine/test_rank_start.py",
    "tests/measure/test_verify.py",
    "tests/measure/test_compare.py",
    "tests/engine/test_lossless.py",
)
"""Files of few tests that take long."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes, a file's tests share one, and so do all tests that start Ray, which needs the cores.

    Long ones come first. Otherwise one process would still work on them at the end, while the others have nothing left to do.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return _SERVERS if file.startswith(_SERVERS) else file

        def _assign_work_unit(self, node: Any) -> None:
            for scope in reversed((_SERVERS, *_LONG)):
                if scope in self.workqueue:
                    self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Objects from the imports stay to the end, so garbage collection need not scan them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_orthrus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Orthrus checkpoint whose drafts are right now and then (float32, tied, block of 8)."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-orthrus")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Qwen3 checkpoint: the AR view of `tiny_orthrus`."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny-qwen3", diffusion=False)


@pytest.fixture(scope="session")
def tiny_reference(tiny_orthrus: Path) -> Reference:
    """The Hugging Face reference of `tiny_orthrus`."""
    return Reference(tiny_orthrus)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per byte: ids 0 to 255 in the order of byte-level BPE's alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are too small for several threads, which would mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ar() -> "Engine":
    """Plain AR decoding of the served model: what every answer must be."""
    from orthrus.engine import Engine
    from orthrus.engine.config import EngineConfig

    model = str(ROOT / "models" / "orthrus-tiny")
    return Engine.from_pretrained(
        EngineConfig(model=model, schedule="ar", device="cpu", kv_cache_tokens=8192)
    )


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Any:
    """Qwen3's own tokenizer. What can't be fetched fails the test: a skip would hide that nothing was checked."""
    from orthrus.text.tokenizer import load_tokenizer
    from tests.qwen3_tokenizer import fetch

    try:
        path = fetch()
    except (OSError, ValueError) as error:
        pytest.fail(f"Qwen3's tokenizer could not be downloaded, and this test needs it: {error}")
    return load_tokenizer(path)
