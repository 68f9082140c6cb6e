"""Read and write checkpoints in Hugging Face format, with or without diffusion weights, in one safetensors file or several.

Before the first weight is read, the file headers are checked against the config. So a wrong checkpoint is found within a second,
and one error lists what is wrong.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from orthrus.errors import CheckpointError
from orthrus.models.config import ModelConfig
from orthrus.models.families import CONFIG_FILE, GENERATION_CONFIG_FILE, family_of
from orthrus.models.family import Family
from orthrus.models.files import check_stored, raise_if
from orthrus.models.lazy_tensors import LazyTensors
from orthrus.models.quantization import StoredPart
from orthrus.models.shard import Shard
from orthrus.models.sizes import dtype_name
from orthrus.models.stored_tensors import INDEX_FILE, SINGLE_FILE, StoredTensor, stored_tensors

# Hugging Face's default, so that a saved model has as many files as one would expect.
DEFAULT_SHARD_BYTES = 5_000_000_000

logger = logging.getLogger(__name__)


def compute_dtype(dtype: str | torch.dtype, config: ModelConfig, device: str | torch.device) -> torch.dtype:
    """The dtype to run in, as `dtype_name` says. Raises ConfigError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found: torch.dtype = getattr(torch, dtype_name(dtype, config, torch.device(device).type))
    return found


def load_weights(
    path: str | Path,
    config: ModelConfig,
    device: str | torch.device,
    dtype: str | torch.dtype = "auto",
    shard: Shard | None = None,
) -> dict[str, Tensor]:
    """Load all tensors at once: see `open_weights`, which raises the same errors."""
    return dict(open_weights(path, config, device, dtype, shard))


def open_weights(
    path: str | Path,
    config: ModelConfig,
    device: str | torch.device,
    dtype: str | torch.dtype = "auto",
    shard: Shard | None = None,
    check: Callable[[], None] = lambda: None,
) -> LazyTensors:
    """Every tensor that the config's family expects (`Family.tensor_shapes`), on `device` in `dtype` (see `compute_dtype`).

    A tensor is read from its file when it is used. The host never holds a second copy of the model.
    shard: the part of the model to load; None for all of it. Of a divided tensor, only this part is read. check: called before
    each tensor is read; an error that it raises ends the loading.
    The tensors of quantised weights keep the dtypes in which they are stored. Only scales are widened, if `dtype` has more than
    16 bits. A tied lm_head is left out, unless the files hold one that differs from the embedding (see `with_own_head`).
    Raises CheckpointError for a tensor that is missing or has another shape. Reading a tensor that holds NaN or infinite values
    raises it too. The message names the file, the tensor, and what was expected and found.
    """
    stored = stored_tensors(Path(path))
    check_stored(Path(path), stored, config)
    family = family_of(config)
    parts = family.stored_parts(config)
    own_head = config.tie_word_embeddings and _has_own_head(stored, family)
    names = [*parts, family.head] if own_head else [*parts]
    reader = _Reader(
        config, torch.device(device), compute_dtype(dtype, config, device), shard, stored, parts, len(names)
    )

    def load(name: str) -> Tensor:
        check()
        return reader.read(name)

    return LazyTensors(names, load)


class _Reader:
    """Reads the tensors of a checkpoint, and shows how many have been read."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        shard: Shard | None,
        stored: Mapping[str, StoredTensor],
        parts: Mapping[str, StoredPart],
        count: int,
    ) -> None:
        """parts: from `Family.stored_parts`. count: how many tensors will be read. The others are those of `open_weights`."""
        self._device, self._dtype, self._shard, self._stored = device, dtype, shard, stored
        self._family = family_of(config)
        self._parts = parts
        self._name, self._count, self._done = config.name, count, 0
        # The file that was read last. Neighbouring tensors are usually in one file.
        self._open: tuple[Path, Any] | None = None
        self._bar: Any = None

    def read(self, name: str) -> Tensor:
        """A tensor, straight to the device."""
        file = self._stored[name].file
        where = f"{file}: tensor {name}"
        try:
            if self._open is None or self._open[0] != file:
                self._open = file, safe_open(file, framework="pt", device=str(self._device))
            part = None if self._shard is None else self._shard.part(self._family.division(name))
            found = _read_part(self._open[1], name, part)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can't be read: {error}") from error
        in_full = name not in self._parts or self._parts[name].in_full
        kind = self._dtype if in_full else _kept_dtype(found.dtype, self._dtype)
        # On a CPU always copy: the tensor is a view of the file, and the file may change.
        tensor = found.to(kind, copy=self._device.type == "cpu")
        check_finite(tensor, where, found)
        if name.endswith(".g_idx"):
            groups = self._parts[f"{name.removesuffix('g_idx')}scales"].shape[0]
            _check_groups(tensor, where, groups)
        self._show(name)
        return tensor

    def _show(self, name: str) -> None:
        """Show that a tensor has been read."""
        # Not before the first layer: what is logged until then, about formats and memory, has lines of its own.
        if self._bar is None and name.startswith(self._family.layer_prefix):
            # Hugging Face's progress bar: users know how to switch it off.
            from transformers.utils import logging as progress

            self._bar = progress.tqdm(
                total=self._count,
                initial=self._done,
                desc=f"loading {self._name}",
                unit="tensor",
                # The ranks load at the same time, and one bar is enough.
                disable=self._shard is not None and self._shard.rank > 0,
            )
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            if self._done == self._count:
                self._bar.close()


def _read_part(tensors: Any, name: str, part: tuple[int, int, int] | None) -> Tensor:
    """A tensor of an open safetensors file, or a part of it: see `Shard.part`."""
    if part is None:
        whole: Tensor = tensors.get_tensor(name)
        return whole
    dim, begin, end = part
    found: Tensor = tensors.get_slice(name)[(slice(None),) * dim + (slice(begin, end),)]
    return found


def _kept_dtype(stored: torch.dtype, target: torch.dtype) -> torch.dtype:
    """The dtype for a tensor of a quantised weight in a model of dtype `target`. Scales are never rounded."""
    is_scale = stored.is_floating_point and stored.itemsize > 1
    return torch.promote_types(stored, target) if is_scale and target.itemsize > 2 else stored


def _check_groups(group_of: Tensor, where: str, groups: int) -> None:
    """Raise CheckpointError unless each input of a weight is in one of its groups."""
    least, most = (int(end) for end in torch.aminmax(group_of))
    if least < 0 or most >= groups:
        raise CheckpointError(
            f"{where}: expected groups from 0 to {groups - 1}, found {least} to {most}: download or save it again"
        )


def _has_own_head(stored: Mapping[str, StoredTensor], family: Family) -> bool:
    """Whether the files hold a head that differs from the embedding. Compared on the host, to spare the device a second copy."""
    if family.head not in stored:
        return False
    head, embedding = (_read_tensor(stored[name].file, name) for name in (family.head, family.embedding))
    return not torch.equal(head.to(embedding.dtype), embedding)


def _read_tensor(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from error


def with_own_head(config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """`config`, untied if the tensors hold a head that differs from the embedding. Hugging Face uses such a head too."""
    family = family_of(config)
    if not config.tie_word_embeddings or family.head not in tensors:
        return config
    if torch.equal(tensors[family.head], tensors[family.embedding]):
        return config
    logger.warning(
        "%s: %s differs from the embedding, although tie_word_embeddings is true: it is used",
        config.name,
        family.head,
    )
    return replace(config, tie_word_embeddings=False)


def check_finite(tensor: Tensor, where: str, original: Tensor) -> None:
    """Raise CheckpointError if a weight is NaN or infinite. where: its name in errors. original: the weight before the cast."""
    if _is_finite(tensor):
        return
    if _is_finite(original):
        raise CheckpointError(
            f"{where} has values too large for {str(tensor.dtype).removeprefix('torch.')}: set dtype to bfloat16 or float32"
        )
    raise CheckpointError(f"{where} holds values that are NaN or infinite: download or save it again")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # e4m3 has no infinity, and its NaN is all ones but for the sign.
        return not bool(((tensor.view(torch.uint8) & 127) == 127).any())
    # One pass without extra memory. aminmax returns NaN if there is one.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a checkpoint. `load_weights` reads it back bit for bit, and transformers reads its AR view.

    tensors: those that the config's family expects (`Family.tensor_shapes`), on any device. All that are stored in full must have
    one dtype. A tied lm_head is left out. One that differs from the embedding makes the checkpoint untied. max_shard_bytes:
    most bytes of weights in one file, unless a single tensor has more. tokenizer: anything with `save_pretrained`. Weights in
    `path` are replaced.
    Raises CheckpointError if tensors and config disagree, ConfigError for a dtype that can't be loaded again.
    """
    path = Path(path)
    config = with_own_head(config, tensors)
    family = family_of(config)
    parts = family.stored_parts(config)
    shapes = {name: part.shape for name, part in parts.items()}
    dtype = _check_given(config, tensors, parts)
    saved = replace(config, dtype=str(dtype).removeprefix("torch."))
    path.mkdir(parents=True, exist_ok=True)

    shards = _split(shapes, tensors, max_shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # Copies, because safetensors refuses tensors that share memory. A new diffusion view may share the AR view's memory.
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

    _write_json(path / CONFIG_FILE, family.write_config(saved))
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    _write_json(path / GENERATION_CONFIG_FILE, {k: v for k, v in generation.items() if v is not None})
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _check_given(
    config: ModelConfig, tensors: Mapping[str, Tensor], parts: Mapping[str, StoredPart]
) -> torch.dtype:
    """The dtype of all `tensors` stored in full. Raises one CheckpointError that lists how the tensors differ from `parts`."""
    problems = []
    for name, shape in ((name, part.shape) for name, part in parts.items()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            problems.append(
                f"tensor {name}: expected shape {list(shape)}, found {list(found) if found else 'none'}"
            )
    allowed = {*parts, family_of(config).head} if config.tie_word_embeddings else set(parts)
    problems += [f"tensor {name}: expected none, found one" for name in tensors if name not in allowed]
    raise_if(problems, "these tensors are not those of the config")
    dtypes = {tensors[name].dtype for name, part in parts.items() if part.in_full}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"expected tensors of one dtype, found {sorted(map(str, dtypes))}: cast them first"
        )
    return dtypes.pop()


def _split(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], max_bytes: int
) -> list[list[str]]:
    """The names in order, cut into runs of at most `max_bytes`. A larger tensor gets a run of its own."""
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
