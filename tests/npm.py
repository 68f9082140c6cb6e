"""Files of npm packages that tests need, checked by the registry's hash; kept under .cache/, not in the repo."""

import base64
import hashlib
import io
import os
import tarfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def fetch(package: str, version: str, sha512: str, files: Sequence[str]) -> Path:
    """The directory with `files` of a package, downloaded once. Raises OSError and ValueError.

    sha512: base64, the registry's `dist.integrity`. files: their paths in the package; they are kept under their names.
    """
    name = package.rpartition("/")[2]
    folder = CACHE / f"{name}-{version}"
    if all((folder / Path(file).name).exists() for file in files):
        return folder
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/{package}/-/{name}-{version}.tgz"
    with urllib.request.urlopen(url, timeout=120) as answer:
        archive = answer.read()
    if base64.b64encode(hashlib.sha512(archive).digest()).decode() != sha512:
        raise ValueError(f"{url} is not the archive that the registry published")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for file in files:
            member = tar.extractfile(f"package/{file}")
            assert member is not None
            # Renamed when complete: an interrupted run leaves no half file.
            partial = folder / f"{Path(file).name}.partial"
            partial.write_bytes(member.read())
            partial.rename(folder / Path(file).name)
    return folder
