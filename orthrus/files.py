"""Read files that may be damaged or hostile. Their kind and size are checked first, and errors name the file."""

import json
import os
import reprlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from orthrus.errors import ConfigError


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to print very large integers.
        return repr(x) if x.bit_length() < 200 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """`value` as error messages show it: its repr, shortened if it is long."""
    return _SHORT.repr(value)


def one_line(error: BaseException) -> str:
    """The message of another library's error, on one line of bounded length."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]}..."


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an integer. JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object, least: float, most: float) -> TypeGuard[float]:
    """Whether it is a number from `least` to `most`."""
    # Compared, not converted: NaN fails the comparison, and an integer may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def file_size(file: Path) -> int:
    """Bytes of a regular file. Raises ConfigError if it is missing, or is a pipe or device, which may block or never end."""
    try:
        status = file.stat()
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing: give a directory in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read: {_reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{file} is not a regular file: replace it with one, or download it again")
    return status.st_size


def read_file(file: Path, most: int) -> bytes:
    """The contents of a regular file of up to `most` bytes. Raises ConfigError for any other, before it is read."""
    size = file_size(file)
    if size > most:
        raise ConfigError(
            f"{file} has {size:,} bytes, and no such file needs more than {most:,}: download it again"
        )
    try:
        # The file may have become a pipe meanwhile: opening it must not wait for a writer.
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            return stream.read(most)
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {_reason(error)}") from error


def parse_json(raw: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON in UTF-8. pairs: builds an object from its keys and values. Raises ValueError for anything else."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(file: Path, most: int = 1 << 20) -> dict[str, Any]:
    """The JSON object in `file`, of up to `most` bytes. Raises ConfigError naming the file for anything else."""
    try:
        data = parse_json(read_file(file, most))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{file} isn't valid JSON ({error}): download or save it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
