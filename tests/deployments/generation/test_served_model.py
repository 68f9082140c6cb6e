"""What an ingress fetches of the model that it serves."""

from fnmatch import fnmatch
from typing import Any

import pytest

from orthrus.deployments.generation.served_model import ServedModel
from orthrus.engine.config import EngineConfig
from orthrus.models import hub
from tests.conftest import ROOT

MODEL = ROOT / "models" / "orthrus-tiny"


def test_an_ingress_fetches_no_weights_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are hundreds of gigabytes for a large model, and a node without GPUs may run it."""
    asked: list[str] = []

    def download(repo: str, *, allow_patterns: list[str], **rest: Any) -> str:
        asked.extend(allow_patterns)
        return str(MODEL)

    monkeypatch.setattr(hub, "_hub_answers", lambda repo: True)
    monkeypatch.setattr(hub, "snapshot_download", download)
    model = ServedModel.load(EngineConfig(model="someone/a-model"))
    assert model.tokenizer.decode(model.tokenizer.encode("x = 1")) == "x = 1"
    fetched = {file.name for file in MODEL.iterdir() if any(fnmatch(file.name, one) for one in asked)}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= fetched
    assert not [name for name in fetched if name.endswith(".safetensors")]
