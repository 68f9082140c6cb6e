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

# Of a tokenizer's file: three times what the largest vocabularies take.
_MOST_FILE_BYTES = 32 << 20
_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "additional_chat_templates/*")


def load_tokenizer(path: Path | str) -> Any:
    """The Hugging Face tokenizer in a checkpoint directory. Raises ConfigError unless it is a fast, byte-level one."""
    # Here, since it brings torch.
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

    What is in other files, and a tokenizer without that one, is not looked at.
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
    """Turn what goes wrong while a tokenizer is loaded into a ConfigError."""
    try:
        yield
    except BaseException as error:
        # What is wrong inside tokenizer.json may come as a panic of its Rust code, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"no tokenizer can be loaded from {path}: {one_line(error)}") from error


def _check_sizes(path: Path | str) -> None:
    for pattern in _FILES:
        # Before transformers opens them, which a pipe would have it wait for.
        for file in Path(path).glob(pattern):
            if (size := file_size(file)) > _MOST_FILE_BYTES:
                raise ConfigError(
                    f"{file} has {size:,} bytes, and no tokenizer needs more than {_MOST_FILE_BYTES:,}: download it again"
                )


def _check_byte_level(tokenizer: Tokenizer, path: Path | str) -> None:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    if "ByteLevel" not in {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}:
        raise ConfigError(f"the tokenizer in {path} is not byte-level BPE, as those of all Qwen3 models are")
