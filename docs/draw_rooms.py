"""Draw docs/rooms.svg from docs/rooms.yaml: `make diagram`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

SOURCE = Path(__file__).with_name("rooms.yaml")
DRAWING = Path(__file__).with_name("rooms.svg")

# Pixels.
WIDTH, MARGIN, GAP = 1040, 16, 8
LABEL_WIDTH = 150
ROOM_HEIGHT, BAND_PADDING, STEP_HEIGHT = 46, 10, 22
FONT = "font-family='system-ui, sans-serif'"


@dataclass
class Canvas:
    """SVG elements, and how far down they reach."""

    elements: list[str]
    y: float

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str) -> None:
        self.elements.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' rx='5' fill='{fill}' stroke='{stroke}'/>"
        )

    def text(self, x: float, y: float, text: str, *, size: int = 11, bold: bool = False) -> None:
        weight = " font-weight='600'" if bold else ""
        self.elements.append(
            f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}'{weight} fill='#1b1f24'>{escape(text)}</text>"
        )

    def badge(self, x: float, y: float, number: int) -> None:
        self.elements.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='8' fill='#b3261e'/>")
        self.elements.append(
            f"<text x='{x:.1f}' y='{y + 3.5:.1f}' {FONT} font-size='10' font-weight='600' text-anchor='middle' "
            f"fill='#ffffff'>{number}</text>"
        )


def draw_band(canvas: Canvas, band: dict[str, Any], steps: dict[str, list[int]]) -> None:
    """One package: its name at the left, its rooms in rows, each with the numbers of a request's steps in it."""
    height = len(band["rows"]) * (ROOM_HEIGHT + GAP) - GAP + 2 * BAND_PADDING
    canvas.box(MARGIN, canvas.y, WIDTH - 2 * MARGIN, height, band["colour"], "#c8ccd1")
    canvas.text(MARGIN + 10, canvas.y + 24, band["name"], size=15, bold=True)
    for line, text in enumerate(band["about"]):
        canvas.text(MARGIN + 10, canvas.y + 42 + 14 * line, text)
    left = MARGIN + LABEL_WIDTH
    for place, row in enumerate(band["rows"]):
        y = canvas.y + BAND_PADDING + place * (ROOM_HEIGHT + GAP)
        width = (WIDTH - MARGIN - BAND_PADDING - left - GAP * (len(row) - 1)) / len(row)
        for column, (name, about) in enumerate(row.items()):
            x = left + column * (width + GAP)
            canvas.box(x, y, width, ROOM_HEIGHT, "#ffffff", "#8c959f")
            canvas.text(x + 8, y + 18, name, size=13, bold=True)
            canvas.text(x + 8, y + 35, about)
            for index, number in enumerate(reversed(steps.get(f"{band['name']}/{name}", []))):
                canvas.badge(x + width - 13 - 19 * index, y + 13, number)
    canvas.y += height + GAP


def drawing(source: str) -> str:
    """The SVG of a source in YAML. Raises KeyError where a step is in a room that no package has."""
    content = yaml.safe_load(source)
    rooms = {f"{band['name']}/{name}" for band in content["packages"] for row in band["rows"] for name in row}
    steps: dict[str, list[int]] = {}
    for number, (room, _) in enumerate(content["request"], 1):
        if room not in rooms:
            raise KeyError(f"docs/rooms.yaml: a request's step {number} is in {room}, which no package has")
        steps.setdefault(room, []).append(number)
    canvas = Canvas([], MARGIN)
    canvas.text(MARGIN, canvas.y + 8, content["caption"], size=12)
    canvas.y += 22
    for band in content["packages"]:
        draw_band(canvas, band, steps)
    canvas.text(MARGIN, canvas.y + 18, content["request_caption"], size=12)
    canvas.y += 28
    rows = math.ceil(len(content["request"]) / 2)
    for index, (room, about) in enumerate(content["request"]):
        x = MARGIN + (index // rows) * (WIDTH - 2 * MARGIN) / 2
        y = canvas.y + (index % rows) * STEP_HEIGHT + 10
        canvas.badge(x + 8, y, index + 1)
        canvas.text(x + 24, y + 4, room, bold=True)
        canvas.text(x + 190, y + 4, about)
    height = canvas.y + rows * STEP_HEIGHT + MARGIN
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0f}' width='{WIDTH}' height='{height:.0f}'>",
            f"<rect width='{WIDTH}' height='{height:.0f}' fill='#ffffff'/>",
            *canvas.elements,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    DRAWING.write_text(drawing(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
