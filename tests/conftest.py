"""Fixtures that several test modules share: tiny checkpoints, built once per run, read only."""

import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads them once: tests never wait for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.reference import Reference


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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models here are too small to share out: threads would mostly wait for each other."""
    torch.set_num_threads(1)
