"""Read and write checkpoints in Hugging Face format: plain Qwen3 and Orthrus, in one safetensors file or several.

A checkpoint is checked against its config from the file headers alone, before the first weight is read: a wrong one
costs a second and one error that lists what is wrong, not a model that writes nonsense.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthrus.config import CONFIG_FILE, DTYPES, GENERATION_CONFIG_FILE, ModelConfig
from orthrus.errors import CheckpointError, ConfigError
from orthrus.stored_tensors import DTYPE_BYTES, INDEX_FILE, SINGLE_FILE, StoredTensor, stored_tensors

# Hugging Face's default, so that a saved model has as many files as one would expect.
DEFAULT_SHARD_BYTES = 5_000_000_000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LISTED_PROBLEMS = 8
_HUB_SECONDS = 5.0
"""Within which the hub must begin to answer."""

logger = logging.getLogger(__name__)


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


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, in the order in which the layers use them."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        for suffix in ("", "_diff") if config.has_diffusion else ("",):
            for name, shape in projections.items():
                shapes[f"{layer}.self_attn.{name}_proj{suffix}.weight"] = shape
                if config.attention_bias:
                    shapes[f"{layer}.self_attn.{name}_proj{suffix}.bias"] = shape[:1]
            for name in ("q", "k"):
                shapes[f"{layer}.self_attn.{name}_norm{suffix}.weight"] = (dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def check_files(path: str | Path, config: ModelConfig) -> None:
    """Check the files' headers against the config, without reading a weight. Raises CheckpointError listing what is wrong."""
    _check_stored(Path(path), stored_tensors(Path(path)), config)


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory that the weights take in `dtype`."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values()) * dtype.itemsize


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory that one position takes in the KV cache: keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def compute_dtype(dtype: str | torch.dtype, config: ModelConfig, device: str | torch.device) -> torch.dtype:
    """The dtype to run in. "auto" is the saved one on an accelerator; float32 on CPU, where halves are slow.

    Raises ConfigError for any name but "auto" and the supported ones.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        dtype = "float32" if torch.device(device).type == "cpu" else config.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported: use auto or one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def load_weights(
    path: str | Path, config: ModelConfig, device: str | torch.device, dtype: str | torch.dtype = "auto"
) -> dict[str, Tensor]:
    """Every tensor of `tensor_shapes(config)` on `device` in `dtype` (see `compute_dtype`).

    Goes tensor by tensor, so the host never holds a second copy of the model. A tied lm_head is left out, but comes along
    where the files hold another than the embedding (see `with_own_head`).
    Raises CheckpointError naming file, tensor, expected and found; also for values that are NaN or infinite.
    """
    # Hugging Face's progress bar, which its users know how to switch off.
    from transformers.utils import logging as progress

    target = compute_dtype(dtype, config, device)
    stored = stored_tensors(Path(path))
    _check_stored(Path(path), stored, config)
    by_file: dict[Path, list[str]] = {}
    names = list(tensor_shapes(config))
    if config.tie_word_embeddings and _has_own_head(stored):
        names.append(HEAD)
    for name in names:
        by_file.setdefault(stored[name].file, []).append(name)
    weights: dict[str, Tensor] = {}
    bar = progress.tqdm(total=sum(map(len, by_file.values())), desc=f"loading {config.name}", unit="tensor")
    for file, names in by_file.items():
        try:
            # Straight to the device: the host never holds more than the tensor under way.
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                for name in names:
                    # On a CPU a copy even where nothing changes: the original is a view of the file, which may change.
                    on_cpu = torch.device(device).type == "cpu"
                    read = tensors.get_tensor(name)
                    weights[name] = read.to(target, copy=on_cpu)
                    check_finite(weights[name], f"{file}: tensor {name}", read)
                    bar.update()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can't be read: {error}") from error
    bar.close()
    return weights


def _has_own_head(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether there is a head that differs from the embedding, by the files, so that no device holds a second one."""
    if HEAD not in stored:
        return False
    head, embedding = (_read_tensor(stored[name].file, name) for name in (HEAD, EMBEDDING))
    return not torch.equal(head.to(embedding.dtype), embedding)


def _read_tensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error


def with_own_head(config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """`config` as the tensors have it: under tied embeddings, a head that differs from them counts, as for Hugging Face."""
    head = tensors.get(HEAD)
    if not config.tie_word_embeddings or head is None or torch.equal(head, tensors[EMBEDDING]):
        return config
    logger.warning(
        "%s: %s differs from the embedding, although tie_word_embeddings is true: it is used",
        config.name,
        HEAD,
    )
    return replace(config, tie_word_embeddings=False)


def check_finite(tensor: Tensor, where: str, original: Tensor) -> None:
    """Raise CheckpointError if a weight is NaN or infinite. original: it before it was cast."""
    if _is_finite(tensor):
        return
    if _is_finite(original):
        raise CheckpointError(
            f"{where} has values too large for {str(tensor.dtype).removeprefix('torch.')}: set dtype to bfloat16 or float32"
        )
    raise CheckpointError(f"{where} holds values that are NaN or infinite: download or save it again")


def _is_finite(tensor: Tensor) -> bool:
    # In one pass that needs no memory; NaN is passed on.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint that `load_weights` reads back bit for bit, and transformers as a Qwen3 (its AR view).

    `tensors` are those of `tensor_shapes(config)`, in one dtype, on any device; a tied lm_head is left out,
    and one that differs from the embedding makes the checkpoint untied. No file
    holds more than `max_shard_bytes` of weights, unless one tensor alone does. Weights that were in `path` are
    replaced. `tokenizer`: anything with `save_pretrained`.
    Raises CheckpointError when tensors and config disagree, ConfigError for a dtype that can't be loaded again.
    """
    path = Path(path)
    config = with_own_head(config, tensors)
    shapes = tensor_shapes(config)
    dtype = _check_given(config, tensors, shapes)
    saved = replace(config, dtype=str(dtype).removeprefix("torch."))
    path.mkdir(parents=True, exist_ok=True)

    shards = _split(shapes, tensors, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # Copies: safetensors refuses tensors that share memory, as a fresh diffusion view may with the AR one.
        shard = {
            n: tensors[n].detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for n in names
        }
        temporary = path / f"{file}.tmp"
        save_file(shard, temporary, metadata={"format": "pt"})
        temporary.replace(path / file)
    for old in (path / SINGLE_FILE, *path.glob("model-*-of-*.safetensors")):
        if old.name not in files:
            old.unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(tensors[name].nbytes for name in shapes)
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(path / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (path / INDEX_FILE).unlink(missing_ok=True)

    _write_json(path / CONFIG_FILE, saved.to_dict())
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    _write_json(path / GENERATION_CONFIG_FILE, {k: v for k, v in generation.items() if v is not None})
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _check_stored(path: Path, stored: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Raise one error that lists how the stored tensors differ from the config's."""
    shapes = tensor_shapes(config)
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
    _raise_if(problems, f"the weights in {path} are not those of its {CONFIG_FILE}")


def _check_given(
    config: ModelConfig, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> torch.dtype:
    """The one dtype of `tensors`. Raises one error that lists how they differ from the config's."""
    problems = []
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            problems.append(
                f"tensor {name}: expected shape {list(shape)}, found {list(found) if found else 'none'}"
            )
    allowed = {*shapes, HEAD} if config.tie_word_embeddings else set(shapes)
    problems += [f"tensor {name}: expected none, found one" for name in tensors if name not in allowed]
    _raise_if(problems, "these tensors are not those of the config")
    dtypes = {tensors[name].dtype for name in shapes}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"expected tensors of one dtype, found {sorted(map(str, dtypes))}: cast them first"
        )
    return dtypes.pop()


def _raise_if(problems: list[str], headline: str) -> None:
    if not problems:
        return
    shown = problems[:_LISTED_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise CheckpointError(f"{headline}:\n  " + "\n  ".join(shown))


def _split(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], max_bytes: int
) -> list[list[str]]:
    """Names in order, cut into runs of at most `max_bytes`, or of one tensor where that is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in shapes:
        if shards[-1] and size + tensors[name].nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes
    return shards


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)
