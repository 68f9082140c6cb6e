"""The Serve configs are what Serve and the engine take; a broken one is told apart by name."""

from pathlib import Path

import pytest

from deployments.app import AppArgs
from deployments.serve import load_config
from orthrus.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_serve_config_is_valid_down_to_the_engine(path: Path) -> None:
    for app in load_config(path).applications:
        assert app.import_path == "deployments.app:build"
        AppArgs.model_validate(app.args)


@pytest.mark.parametrize(("text", "said"), [("- 1", "Serve config"), ("applications: [", "Serve config")])
def test_a_broken_serve_config_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(file)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "missing.yaml")
