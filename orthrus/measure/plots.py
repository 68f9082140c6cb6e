"""Files into which a report is drawn."""

from pathlib import Path
from typing import Any

from orthrus.errors import ConfigError


def load_pyplot() -> Any:
    """matplotlib.pyplot, for files alone. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'orthrus-serve[train]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def check_plot(file: Path | None) -> None:
    """Raise ConfigError if no report can be drawn into this file. None: none shall be. Called before what takes long."""
    if file is None:
        return
    figure = load_pyplot().figure()
    formats = sorted(figure.canvas.get_supported_filetypes())
    load_pyplot().close(figure)
    if file.suffix.removeprefix(".") not in formats:
        raise ConfigError(
            f"--plot {file} has no format that can be drawn: end it in one of {', '.join(formats)}"
        )
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot {file}: the folder {file.absolute().parent} is not there")
