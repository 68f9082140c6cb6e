"""Prompts for the model to answer, from a JSONL file."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orthrus.errors import ConfigError


def read_prompts(file: Path, tokenizer: Any, template_arguments: dict[str, Any]) -> list[list[int]]:
    """Token ids of every prompt in `file`. Each line is a JSON object: {"prompt": text}, or {"messages": [...]} for a chat.

    template_arguments: for the chat template, such as Qwen3's enable_thinking. Raises ConfigError that names file and line.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{file} can't be read: {error.strerror}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if "messages" in entry:
                text = tokenizer.apply_chat_template(
                    entry["messages"], tokenize=False, add_generation_prompt=True, **template_arguments
                )
            else:
                text = entry["prompt"]
            tokens = tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # A template may raise anything.
            raise ConfigError(
                f'{file}, line {number}: expected {{"prompt": text}} or {{"messages": [...]}} ({error})'
            ) from error
        if tokens:
            prompts.append(tokens)
    if not prompts:
        raise ConfigError(f'{file} has no prompts: give one a line, as {{"prompt": text}}')
    return prompts


def digest(sequences: Iterable[Sequence[int]]) -> str:
    """SHA-256 of token sequences."""
    return hashlib.sha256("\n".join(" ".join(map(str, s)) for s in sequences).encode()).hexdigest()
