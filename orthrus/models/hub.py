"""Find a model: a directory here, or a snapshot of the Hugging Face hub.

Imports no torch, which takes seconds. So `orthrus config check`, and a server that can't start, report errors at once.
"""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from orthrus.errors import CheckpointError
from orthrus.models.families import CONFIG_FILE, GENERATION_CONFIG_FILE

_LISTED_MODELS = 8
_HUB_SECONDS = 5.0
"""How long the hub may take to begin its answer."""


class HubUnreachable(CheckpointError):
    """A hub id is not in the local cache, and the hub can't be reached. So nothing is known about the model."""


# Files in subfolders are left out: they hold the same weights in other formats.
TEXT_FILES = ("*.json", "*.txt", "*.jinja")
"""What says what a model is and how it reads and writes text: all but its weights."""
_ALL_FILES = (*TEXT_FILES, "*.safetensors")
CONFIG_FILES = (CONFIG_FILE, GENERATION_CONFIG_FILE)


def resolve(
    model: str | Path, files: Sequence[str] = _ALL_FILES, folders: Sequence[Path] = (Path(),)
) -> Path:
    """The directory of a model. model: a directory, or a hub id. A snapshot that is not in the local cache is downloaded.

    files: names or patterns of the files that the snapshot must have. With `CONFIG_FILES`, weights are not downloaded.
    folders: where relative paths may begin. If `model` is "a/b" and one of these has a folder "a", then `model` is taken for a
    path. It is taken for a hub id only if its snapshot is in the cache already.
    Raises CheckpointError, which says whether the path, the hub id, the access or the network is at fault.
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
    """Whether the hub answers at all within `_HUB_SECONDS`. A download would try for minutes."""
    try:
        HfApi().model_info(repo, timeout=_HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True  # The download reports what the answer means.
    except Exception:  # The HTTP library, and so its errors, differ between versions of the hub's client.
        return False
    return True


def _no_directory(path: Path, beside: Path) -> str:
    """The error for a model that is missing from a folder that exists."""
    others = sorted(entry.name for entry in beside.iterdir() if (entry / CONFIG_FILE).is_file())
    found = f" with the models {', '.join(others[:_LISTED_MODELS])}" if others else ""
    return (
        f"no directory {path}, and {path.parent} is a folder here{found}: correct the path. If you mean the hub's {path}, "
        f"fetch it first: hf download {path}"
    )
