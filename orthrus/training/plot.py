"""Curves of a run's metrics as SVG files, with matplotlib (the `train` extra)."""

import json
from pathlib import Path
from typing import Any

from orthrus.errors import ConfigError
from orthrus.measure.plots import load_pyplot

Panel = dict[str, list[tuple[float, float]]]


def plot(folder: Path) -> list[Path]:
    """Draw each of base.jsonl, heads.jsonl, medusa.jsonl and eval.json that `folder` has, into the same folder.

    Returns the files written. Raises ConfigError if matplotlib is not installed, or if the folder has none of these files.
    """
    load_pyplot()  # Raises before anything is read if matplotlib is missing.
    figures: dict[str, dict[str, Panel]] = {}
    drafts = ("kl", "tokens_per_cycle")
    for stage, keys in (("base", ("loss", "held_out_loss")), ("heads", drafts), ("medusa", drafts)):
        if (folder / f"{stage}.jsonl").exists():
            figures[stage] = _training_panels(folder / f"{stage}.jsonl", keys)
    if (folder / "eval.json").exists():
        figures["eval"] = _eval_panels(folder / "eval.json")
    if not figures:
        raise ConfigError(f"{folder} has no metrics: train first")
    return [_draw(folder / f"{name}.svg", panels) for name, panels in figures.items()]


def _training_panels(file: Path, keys: tuple[str, ...]) -> dict[str, Panel]:
    panels: dict[str, Panel] = {key: {} for key in keys}
    for line in file.read_text(encoding="utf-8").splitlines():
        values: dict[str, Any] = json.loads(line)
        for key in keys:
            if key in values:
                panels[key].setdefault("", []).append((values["step"], values[key]))
        for depth, share in enumerate(values.get("agreement", ()), 1):
            if depth & (depth - 1) == 0:
                curves = panels.setdefault("agreement by depth", {})
                curves.setdefault(str(depth), []).append((values["step"], share))
    return panels


def _eval_panels(file: Path) -> dict[str, Panel]:
    panels: dict[str, Panel] = {"tokens per cycle by block length": {}, "acceptance by depth": {}}
    for row in json.loads(file.read_text(encoding="utf-8"))["drafts"]:
        name = f"T = {row['temperature']:g}" + (", lead" if row["lead"] else "")
        point = (row["block_rows"], row["tokens_per_cycle"])
        panels["tokens per cycle by block length"].setdefault(name, []).append(point)
        # Later rows replace earlier ones, so the curve is that of the longest block, which comes last.
        panels["acceptance by depth"][name] = list(enumerate(row["acceptance"], 1))
    return panels


def _draw(file: Path, panels: dict[str, Panel]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if any(curves):
            axes.legend(fontsize=8)
    figure.savefig(file)
    return file
