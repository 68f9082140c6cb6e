"""Check that the weight files of a checkpoint hold what its config says, by their headers alone.

Imports no torch, which takes seconds. So `orthrus config check`, and a server that can't start, report errors at once.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from orthrus.errors import CheckpointError
from orthrus.models.config import ModelConfig
from orthrus.models.families import CONFIG_FILE, family_of
from orthrus.models.stored_tensors import StoredTensor, stored_tensors

_LISTED_PROBLEMS = 8
_TOKENIZER_FILES = (
    *("tokenizer*", "chat_template*", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json"),
)


def check_files(path: str | Path, config: ModelConfig) -> None:
    """Check the files' headers against the config without reading a weight. Raises CheckpointError that lists what is wrong."""
    check_stored(Path(path), stored_tensors(Path(path)), config)


def check_stored(path: Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Raise one CheckpointError that lists how the stored tensors differ from those that the config's family expects."""
    family = family_of(config)
    parts = family.stored_parts(config)
    has_diffusion = any("_diff." in name for name in stored)
    if has_diffusion and not config.has_diffusion:
        raise CheckpointError(
            f"{path} has diffusion weights (*_diff), but {CONFIG_FILE} has no block_size: add the block_size "
            "and mask_token_id that they were trained with (the published models: 32 and 151669)"
        )
    if config.has_diffusion and not has_diffusion:
        raise CheckpointError(
            f"{CONFIG_FILE} in {path} has block_size {config.block_size}, but there are no diffusion weights "
            "(*_diff): use the Orthrus checkpoint, or remove block_size and mask_token_id to serve the AR view"
        )
    if family.head in stored:
        # Some tools write a tied head too.
        parts[family.head] = parts[family.embedding]
    problems = []
    for name, part in parts.items():
        shape = part.shape
        if name not in stored:
            problems.append(f"tensor {name}: expected shape {list(shape)}, found none")
        elif stored[name].shape != shape:
            found = stored[name]
            problems.append(
                f"{found.file.name}: tensor {name}: expected shape {list(shape)}, found {list(found.shape)}"
            )
        elif stored[name].dtype not in part.dtypes:
            found = stored[name]
            problems.append(
                f"{found.file.name}: tensor {name}: expected dtype {', '.join(part.dtypes)}, found {found.dtype}"
            )
    for name, tensor in stored.items():
        if name not in parts:
            problems.append(
                f"{tensor.file.name}: tensor {name}: expected none, found shape {list(tensor.shape)}"
            )
    raise_if(problems, f"the weights in {path} are not those of its {CONFIG_FILE}")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files unchanged. A library that loads and saves them would change settings that it doesn't know."""
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def raise_if(problems: list[str], headline: str) -> None:
    """If there are problems, raise one CheckpointError that lists the first of them below the headline."""
    if not problems:
        return
    shown = problems[:_LISTED_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise CheckpointError(f"{headline}:\n  " + "\n  ".join(shown))
