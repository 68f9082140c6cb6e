"""Checks for the files that reports are drawn into."""

from pathlib import Path
from typing import Any

from orthrus.errors import ConfigError


def load_pyplot() -> Any:
    """matplotlib.pyplot, set up to draw into files only. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'orthrus-serve[train]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(file: Path | None) -> None:
    """Raise ConfigError if a report can't be drawn into `file`. Called before a long measurement. None: nothing is drawn."""
    if file is None:
        return
    figure = load_pyplot().figure()
    formats = sorted(figure.canvas.get_supported_filetypes())
    load_pyplot().close(figure)
    if file.suffix.removeprefix(".") not in formats:
        raise ConfigError(
            f"--plot {file} has no image format that is known: end it in one of {', '.join(formats)}"
        )
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot {file}: the folder {file.absolute().parent} does not exist")
