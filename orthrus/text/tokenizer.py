"""Load the tokenizer of a checkpoint, or say what is wrong with it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from orthrus.errors import ConfigError
from orthrus.files import file_size, one_line
from orthrus.text.chat_limits import check_templates

# The largest file of a tokenizer: three times what the largest vocabularies take.
_MOST_FILE_BYTES = 32 << 20
_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "additional_chat_templates/*")


def load_tokenizer(path: Path | str) -> Any:
    """The Hugging Face tokenizer in a checkpoint directory. Raises ConfigError unless it is a fast, byte-level one."""
    # Imported here, because it imports torch.
    from transformers import AutoTokenizer

    _check_sizes(path)
    with _refusing(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer in {path} has no tokenizer.json: save it with a fast tokenizer")
    _check_byte_level(tokenizer.backend_tokenizer, path)
    try:
        check_templates(tokenizer)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return tokenizer


def check_tokenizer(path: Path | str) -> None:
    """Raise ConfigError for a tokenizer.json that `load_tokenizer` would refuse, without loading transformers.

    Other files are not checked, nor is a tokenizer without a tokenizer.json.
    """
    _check_sizes(path)
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return
    with _refusing(path):
        tokenizer = Tokenizer.from_file(str(file))
    _check_byte_level(tokenizer, path)


@contextmanager
def _refusing(path: Path | str) -> Iterator[None]:
    """Turn any error while a tokenizer is loaded into a ConfigError."""
    try:
        yield
    except BaseException as error:
        # A mistake in tokenizer.json may raise a panic of the Rust code, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"no tokenizer can be loaded from {path}: {one_line(error)}") from error


def _check_sizes(path: Path | str) -> None:
    for pattern in _FILES:
        # Before transformers opens them: opening a pipe would wait for a writer.
        for file in Path(path).glob(pattern):
            if (size := file_size(file)) > _MOST_FILE_BYTES:
                raise ConfigError(
                    f"{file} has {size:,} bytes, and no tokenizer needs more than {_MOST_FILE_BYTES:,}: download it again"
                )


def _check_byte_level(tokenizer: Tokenizer, path: Path | str) -> None:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    if "ByteLevel" not in {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}:
        raise ConfigError(f"the tokenizer in {path} is not byte-level BPE, the only kind that is supported")
