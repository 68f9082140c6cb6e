"""Read and write checkpoints in Hugging Face format: plain Qwen3 and Orthrus, in one safetensors file or several.

A checkpoint is checked against its config from the file headers alone, before the first weight is read: a wrong one
costs a second and one error that lists what is wrong, not a model that writes nonsense.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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

from orthrus.config import CONFIG_FILE, DTYPES, GENERATION_CONFIG_FILE, ModelConfig, read_json
from orthrus.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Hugging Face's default, so that a saved model has as many files as one would expect.
DEFAULT_SHARD_BYTES = 5_000_000_000
_LISTED_PROBLEMS = 8
_HUB_SECONDS = 5.0
"""Within which the hub must begin to answer."""
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class CheckpointError(ConfigError):
    """A checkpoint that can't be found, read or used with its config; the message names the file and the fix."""


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
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
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
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_files(path: str | Path, config: ModelConfig) -> None:
    """Check the files' headers against the config, without reading a weight. Raises CheckpointError listing what is wrong."""
    _check_stored(Path(path), _stored_tensors(Path(path)), config)


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

    Goes tensor by tensor, so the host never holds a second copy of the model. A tied lm_head is left out.
    Raises CheckpointError naming file, tensor, expected and found.
    """
    # Hugging Face's progress bar, which its users know how to switch off.
    from transformers.utils import logging as progress

    target = compute_dtype(dtype, config, device)
    stored = _stored_tensors(Path(path))
    _check_stored(Path(path), stored, config)
    by_file: dict[Path, list[str]] = {}
    for name in tensor_shapes(config):
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
                    weights[name] = tensors.get_tensor(name).to(target, copy=on_cpu)
                    bar.update()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can't be read: {error}") from error
    bar.close()
    return weights


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint that `load_weights` reads back bit for bit, and transformers as a Qwen3 (its AR view).

    `tensors` are those of `tensor_shapes(config)`, in one dtype, on any device; a tied lm_head is left out. No file
    holds more than `max_shard_bytes` of weights, unless one tensor alone does. Weights that were in `path` are
    replaced. `tokenizer`: anything with `save_pretrained`.
    Raises CheckpointError when tensors and config disagree, ConfigError for a dtype that can't be loaded again.
    """
    path = Path(path)
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


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor as the header of its safetensors file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _stored_tensors(path: Path) -> dict[str, _StoredTensor]:
    """Every tensor in the checkpoint's files, from the headers."""
    if (path / SINGLE_FILE).is_file():
        return dict(_read_header(path / SINGLE_FILE))
    index = path / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}: give a checkpoint saved as safetensors"
            + _other_weights(path)
        )
    return _read_shards(index)


def _read_shards(index: Path) -> dict[str, _StoredTensor]:
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{index}: expected weight_map to map tensor names to file names: save or download it again"
        )
    stored: dict[str, _StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: expected file names without a folder, found {file!r}")
        if not (index.parent / file).is_file():
            raise CheckpointError(
                f"{index.parent / file} is missing, {index.name} lists it: download it again"
            )
        for name, tensor in _read_header(index.parent / file):
            if weight_map.get(name) != file:
                listed = weight_map.get(name, "no file")
                raise CheckpointError(
                    f"{tensor.file}: found tensor {name}, which {index.name} expects in {listed}"
                )
            stored[name] = tensor
    for name, file in weight_map.items():
        if name not in stored:
            raise CheckpointError(
                f"{index.parent / file}: tensor {name} is missing, {index.name} expects it there"
            )
    return stored


def _read_header(file: Path) -> Iterator[tuple[str, _StoredTensor]]:
    """Name and description of each tensor in a safetensors file, whose size is checked against them."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            # A damaged length can be anything: never read more than there is.
            raw = stream.read(length) if len(start) == 8 and 8 + length <= size else None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from error
    if raw is None:
        raise CheckpointError(f"{file}: expected a safetensors header, found {size} bytes: download it again")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        ends = {name: 8 + length + int(entry["data_offsets"][1]) for name, entry in header.items()}
        found = {name: _StoredTensor(file, tuple(e["shape"]), str(e["dtype"])) for name, e in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} has no valid safetensors header: download it again") from error
    expected = max(ends.values(), default=8 + length)
    if size != expected:
        cut = next((name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size), None)
        where = f", cut short in tensor {cut}" if cut else ""
        raise CheckpointError(f"{file}: expected {expected} bytes, found {size}{where}: download it again")
    yield from found.items()


def _check_stored(path: Path, stored: Mapping[str, _StoredTensor], config: ModelConfig) -> None:
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
    problems = []
    for name, shape in shapes.items():
        if name not in stored:
            problems.append(f"tensor {name}: expected shape {list(shape)}, found none")
        elif stored[name].shape != shape:
            found = stored[name]
            problems.append(
                f"{found.file.name}: tensor {name}: expected shape {list(shape)}, found {list(found.shape)}"
            )
        elif stored[name].dtype not in _DTYPE_BYTES:
            found = stored[name]
            problems.append(
                f"{found.file.name}: tensor {name}: expected dtype {', '.join(_DTYPE_BYTES)}, found {found.dtype}"
            )
    for name, tensor in stored.items():
        # Some tools write a tied head out as well.
        if name not in shapes and name != "lm_head.weight":
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
    allowed = {*shapes, "lm_head.weight"} if config.tie_word_embeddings else set(shapes)
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


def _other_weights(path: Path) -> str:
    """What kind of weights the directory has instead, as the end of a sentence."""
    others = sorted(
        f.name for f in path.glob("*") if f.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}
    )
    return f" (found {', '.join(others)})" if others else ""


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
