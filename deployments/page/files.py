"""The page's files, read once: plain HTML, style sheets and modules, which a browser runs as they are."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path(__file__).with_name("static")
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page."""

    content: bytes
    media_type: str
    etag: str
    """Of the content, in quotes as the header has it."""


def read_files() -> dict[str, PageFile]:
    """The page's files by name."""
    return {
        path.name: PageFile(
            content := path.read_bytes(),
            _MEDIA_TYPES[path.suffix],
            f'"{hashlib.sha256(content).hexdigest()[:16]}"',
        )
        for path in sorted(_FOLDER.iterdir())
        if path.suffix in _MEDIA_TYPES
    }
