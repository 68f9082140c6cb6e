"""One checkpoint for the tests of `orthrus.accelerate`, and both models of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import (
    Qwen3ForCausalLM,
)

from orthrus.generate.accelerated import AcceleratedModel
from tests.checkpoints import make_checkpoint
from tests.generate.against import VOCAB, accelerated, load_reference


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("accelerate") / "orthrus", vocab_size=VOCAB, seed=1)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Qwen3ForCausalLM:
    return load_reference(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> AcceleratedModel:
    return accelerated(checkpoint)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "model" in request.fixturenames:
        engine = request.getfixturevalue("model").engine
        assert not engine.has_work
        assert engine.stats.kv_pages_used == 0
