"""Find a model, and what its files must hold, by names and headers alone.

Free of torch, whose import takes seconds: `orthrus config check` and a server that can't start say so before.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from orthrus.errors import CheckpointError, ConfigError
from orthrus.models.config import DTYPE_SIZES, ModelConfig
from orthrus.models.families import CONFIG_FILE, GENERATION_CONFIG_FILE, family_of
from orthrus.models.family import EMBEDDING, HEAD
from orthrus.models.stored_tensors import DTYPE_BYTES, StoredTensor, stored_tensors

_LISTED_PROBLEMS = 8
_HUB_SECONDS = 5.0
"""Within which the hub must begin to answer."""


class HubUnreachable(CheckpointError):
    """A hub id that is not in the local cache, while the hub can't be asked: nothing is known about the model."""


# Subfolders hold other formats of the same weights.
_ALL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
CONFIG_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE)


def resolve(
    model: str | Path, files: Sequence[str] = _ALL_FILES, folders: Sequence[Path] = (Path(),)
) -> Path:
    """The directory of `model`: itself when it is one, else that hub id's snapshot, downloaded when needed.

    files: names or patterns of what the snapshot must have, `CONFIG_FILES` to look before the weights are fetched.
    folders: where relative paths may begin. A name of two parts whose first is a folder there is taken for a path, and
    for a hub id only if its snapshot is here already.
    Raises CheckpointError saying whether the path, the hub id, the access or the network is at fault.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the directory that holds {CONFIG_FILE}")
    repo = str(model)
    if isinstance(model, Path) or repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise CheckpointError(
            f"no directory {path}: give a directory in Hugging Face format or a hub id (org/name)"
        )
    beside = next((folder / path.parent for folder in folders if (folder / path.parent).is_dir()), None)
    try:
        local_only = beside is not None or not _hub_answers(repo)
        return Path(
            snapshot_download(
                repo, allow_patterns=list(files), ignore_patterns=["*/*"], local_files_only=local_only
            )
        )
    except HFValidationError as error:
        raise CheckpointError(f"no directory {path}, and no valid hub id either: {error}") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms on the hub, then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"no directory {path}, and no such model on the hub: check the spelling; for a private one, "
            "log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        if beside is not None:
            raise CheckpointError(_no_directory(path, beside)) from error
        raise HubUnreachable(
            f"no directory {path}, and {repo} is neither in the local hub cache nor can the hub be reached: "
            "give a directory, or check the network and HF_HUB_OFFLINE"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{repo} could not be downloaded from the hub: {error}") from error


def _hub_answers(repo: str) -> bool:
    """Whether the hub says anything about `repo` within seconds. A download would try for minutes."""
    try:
        HfApi().model_info(repo, timeout=_HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True  # What it says is for the download to tell.
    except (
        Exception
    ):  # Every version of the hub's client has its HTTP library's errors for a network that fails.
        return False
    return True


def _no_directory(path: Path, beside: Path) -> str:
    """What to say of a model that is missing from a folder that is here."""
    others = sorted(entry.name for entry in beside.iterdir() if (entry / CONFIG_FILE).is_file())
    found = f" with the models {', '.join(others[:_LISTED_PROBLEMS])}" if others else ""
    return (
        f"no directory {path}, and {path.parent} is a folder here{found}: correct the path. If you mean the hub's {path}, "
        f"fetch it first: hf download {path}"
    )


def check_files(path: str | Path, config: ModelConfig) -> None:
    """Check the files' headers against the config, without reading a weight. Raises CheckpointError listing what is wrong."""
    check_stored(Path(path), stored_tensors(Path(path)), config)


def check_stored(path: Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Raise one error that lists how the stored tensors differ from the config's."""
    shapes = family_of(config).tensor_shapes(config)
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
    if HEAD in stored:
        # Some tools write a tied head out as well.
        shapes[HEAD] = shapes[EMBEDDING]
    problems = []
    for name, shape in shapes.items():
        if name not in stored:
            problems.append(f"tensor {name}: expected shape {list(shape)}, found none")
        elif stored[name].shape != shape:
            found = stored[name]
            problems.append(
                f"{found.file.name}: tensor {name}: expected shape {list(shape)}, found {list(found.shape)}"
            )
        elif stored[name].dtype not in DTYPE_BYTES:
            found = stored[name]
            problems.append(
                f"{found.file.name}: tensor {name}: expected dtype {', '.join(DTYPE_BYTES)}, found {found.dtype}"
            )
    for name, tensor in stored.items():
        if name not in shapes:
            problems.append(
                f"{tensor.file.name}: tensor {name}: expected none, found shape {list(tensor.shape)}"
            )
    raise_if(problems, f"the weights in {path} are not those of its {CONFIG_FILE}")


def raise_if(problems: list[str], headline: str) -> None:
    """Raise one CheckpointError that lists the first of the problems, if there are any."""
    if not problems:
        return
    shown = problems[:_LISTED_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise CheckpointError(f"{headline}:\n  " + "\n  ".join(shown))


def weight_bytes(config: ModelConfig, item_bytes: int) -> int:
    """Memory that the weights take with `item_bytes` for a number."""
    return sum(math.prod(shape) for shape in family_of(config).tensor_shapes(config).values()) * item_bytes


def kv_bytes_per_token(config: ModelConfig, item_bytes: int) -> int:
    """Memory that one position takes in the KV cache: keys and values of all layers, `item_bytes` for a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item_bytes


def dtype_name(dtype: str, config: ModelConfig, device: str) -> str:
    """The dtype to run in. "auto" is the saved one on an accelerator; float32 on CPU, where halves are slow.

    device: "cpu" or another kind. Raises ConfigError for any name but "auto" and the supported ones.
    """
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else config.dtype
    if dtype not in DTYPE_SIZES:
        raise ConfigError(f"dtype {dtype!r} is not supported: use auto or one of {', '.join(DTYPE_SIZES)}")
    return dtype
