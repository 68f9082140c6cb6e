"""Write a copy of a checkpoint with other weights, for quantised and pruned copies."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from orthrus.errors import ConfigError
from orthrus.models.checkpoint import save_checkpoint
from orthrus.models.config import ModelConfig
from orthrus.models.families import CONFIG_FILE, GENERATION_CONFIG_FILE
from orthrus.models.files import copy_tokenizer


def check_folder(path: Path, out: Path) -> None:
    """Raise ConfigError if the folder `out` is `path`, the original, or holds another checkpoint already."""
    if out.resolve() == path.resolve():
        raise ConfigError(f"{out} is the checkpoint itself: give another folder for the copy")
    if (out / CONFIG_FILE).exists() or any(out.glob("*.safetensors")):
        raise ConfigError(f"{out} holds a checkpoint already: give a new folder")


def make_folder(out: Path) -> None:
    """Make the folder `out`. Raises ConfigError if it can't be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} can't be written: {error}") from error


def write_copy(path: Path, out: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config and tensors to the folder `out`, with the tokenizer and the sampling defaults of the checkpoint `path`."""
    save_checkpoint(out, config, tensors)
    copy_tokenizer(path, out)
    if (path / GENERATION_CONFIG_FILE).exists():
        shutil.copyfile(path / GENERATION_CONFIG_FILE, out / GENERATION_CONFIG_FILE)
