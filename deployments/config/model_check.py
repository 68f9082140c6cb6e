"""Checks a model before replicas start, so that a fault shows in seconds, and not after several replicas have failed."""

from pathlib import Path

from orthrus.engine.config import EngineConfig
from orthrus.models.config import ModelConfig
from orthrus.models.families import load_config
from orthrus.models.files import check_files
from orthrus.models.hub import CONFIG_FILES, resolve
from orthrus.models.medusa_config import MedusaConfig, read_medusa
from orthrus.text.tokenizer import check_tokenizer, load_tokenizer

_ROOT = Path(__file__).resolve().parents[2]


def locate(engine: EngineConfig) -> EngineConfig:
    """The settings, with paths that exist below the repository's root made absolute. So a config works from any directory."""
    changes: dict[str, str] = {}
    if (local := _ROOT / engine.model).is_dir():
        changes = {"model": str(local), "served_model_name": engine.served_model_name or local.name}
    if engine.medusa_heads is not None and (heads := _ROOT / engine.medusa_heads).is_dir():
        changes["medusa_heads"] = str(heads)
    return engine.model_copy(update=changes)


def check_model(engine: EngineConfig, *, load: bool = True) -> ModelConfig:
    """Check that the model which the settings name can be served with them. Returns the model's config.

    Of a directory, everything is checked except the values of the weights. Of a hub id, only its config.json is. load: load the
    tokenizer, which imports torch and transformers; without it, only tokenizer.json is checked. Raises HubUnreachable, and
    ConfigError naming the setting or the file that is wrong.
    """
    path = resolve(engine.model, CONFIG_FILES, (Path(), _ROOT))
    model = load_config(path)
    engine.check_model(model)
    find_medusa(engine, model)
    if Path(engine.model).is_dir():
        check_files(path, model)
        (load_tokenizer if load else check_tokenizer)(path)
    return model


def find_medusa(engine: EngineConfig, model: ModelConfig) -> MedusaConfig | None:
    """The Medusa heads that the settings ask for; None if they ask for none, or their folder is not on this machine.

    Raises ConfigError and CheckpointError for a folder without heads for `model`.
    """
    folder = engine.medusa_folder(Path(engine.model))
    return read_medusa(folder, model) if folder is not None and folder.is_dir() else None
