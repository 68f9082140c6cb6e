"""Lists the tensors in the safetensors files of a checkpoint, from their headers. No weight is read.

A header may be damaged or hostile, so everything in it is checked. The safetensors library, which reads the weights later, makes
some of these checks too, but its errors do not name what is wrong.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus.errors import CheckpointError, ConfigError
from orthrus.files import file_size, is_int, parse_json, read_json, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MOST_HEADER_BYTES = 8 << 20
"""The largest header, and the largest index file: ten times what the deepest models need."""
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
_DTYPE_BYTES |= {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SHOWN_NAME = 200


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its safetensors file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor in the checkpoint's files. Raises CheckpointError naming the file that is at fault."""
    try:
        if (path / SINGLE_FILE).exists():
            return dict(_read_header(path / SINGLE_FILE))
        index = path / INDEX_FILE
        if not index.exists():
            raise CheckpointError(
                f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}: give a checkpoint saved as safetensors"
                + _other_weights(path)
            )
        return _read_shards(index)
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index, MOST_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{index}: expected weight_map to map tensor names to file names: save or download it again"
        )
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{index}: expected file names without a folder, found {shown(file)}")
        if not (index.parent / file).exists():
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


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Name and description of each tensor in a safetensors file. Checks that the file is as long as they say."""
    size = file_size(file)
    raw = None
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            # A damaged length can be any number: never read more than the file has.
            if len(start) == 8 and 8 + length <= size:
                if length > MOST_HEADER_BYTES:
                    raise CheckpointError(
                        f"{file}: the header has {length:,} bytes, and no model needs more than "
                        f"{MOST_HEADER_BYTES:,}: download it again"
                    )
                raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from error
    if raw is None:
        raise CheckpointError(f"{file}: expected a safetensors header, found {size} bytes: download it again")
    try:
        header = _parse(raw)
    except ValueError as error:
        raise CheckpointError(
            f"{file} has no valid safetensors header ({error}): download it again"
        ) from error
    ends = {name: 8 + length + entry["data_offsets"][1] for name, entry in header.items()}
    expected = max(ends.values(), default=8 + length)
    if size != expected:
        cut = next((name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size), None)
        where = f", cut short in tensor {cut}" if cut else ""
        raise CheckpointError(f"{file}: expected {expected} bytes, found {size}{where}: download it again")
    for name, entry in header.items():
        yield name, StoredTensor(file, tuple(entry["shape"]), entry["dtype"])


def _parse(raw: bytes) -> dict[str, dict[str, Any]]:
    """The entries of a header, each with dtype, shape and data_offsets that fit together. Raises ValueError."""
    header = parse_json(raw, _without_repeats)
    if not isinstance(header, dict):
        raise ValueError("it is no object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        _check_entry(name, entry)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, after = entry["data_offsets"]
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves bytes before it unused"
            raise ValueError(f"tensor {name} {what}")
        end = after
    return header


def _check_entry(name: str, entry: Any) -> None:
    if len(name) > _SHOWN_NAME or not name.isprintable():
        raise ValueError(f"{shown(name)} is no name of a tensor")
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name} is not described by an object")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    dtype: Any = entry.get("dtype")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(is_int(n) and 0 <= n < 1 << 63 for n in value):
            raise ValueError(f"tensor {name}: {key} is {shown(value)}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name}: data_offsets is {shown(offsets)}")
    if not isinstance(dtype, str) or len(shape) > 8:
        raise ValueError(f"tensor {name}: dtype is {shown(dtype)} and shape {shown(shape)}")
    width = _DTYPE_BYTES.get(dtype)
    if width is not None and math.prod(shape) * width != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {name} of shape {shape} in {dtype} has {offsets[1] - offsets[0]} bytes")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {shown(name)} twice")
        found[name] = value
    return found


def _other_weights(path: Path) -> str:
    """The end of an error message: which other files of weights the directory has."""
    others = sorted(
        f.name for f in path.glob("*") if f.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}
    )
    return f" (found {', '.join(others[:8])})" if others else ""
