"""Look at a model before replicas start: what is wrong with it shows in seconds, not after they have failed in turn."""

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
    """The settings with paths that exist below the project taken from there: a config works from any directory."""
    changes: dict[str, str] = {}
    if (local := _ROOT / engine.model).is_dir():
        changes = {"model": str(local), "served_model_name": engine.served_model_name or local.name}
    if engine.medusa_heads is not None and (heads := _ROOT / engine.medusa_heads).is_dir():
        changes["medusa_heads"] = str(heads)
    return engine.model_copy(update=changes)


def check_model(engine: EngineConfig, *, load: bool = True) -> ModelConfig:
    """The config of the model that the settings name, which can be served with them.

    Of a directory everything is checked but the weights' values; of a hub id its config.json. load: load the tokenizer,
    for which torch and transformers are imported; else only its tokenizer.json is looked at. Raises HubUnreachable, and
    ConfigError naming what is wrong, the setting or the file.
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
