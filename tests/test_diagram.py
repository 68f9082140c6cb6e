"""docs/rooms.svg shows the rooms that there are, and is what its source says."""

import importlib.util

from tests.imports import ROOT
from tests.test_arrows import ROOMS


def test_the_diagram_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs" / "draw_rooms.py")
    assert spec is not None and spec.loader is not None
    draw_rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_rooms)
    drawn = draw_rooms.drawing(draw_rooms.SOURCE.read_text(encoding="utf-8"))
    assert drawn == draw_rooms.DRAWING.read_text(encoding="utf-8"), (
        "docs/rooms.yaml has changed: make diagram"
    )
    shown = {
        f"{package['name']}/{room}"
        for package in draw_rooms.load(draw_rooms.SOURCE)["packages"]
        for row in package["rows"]
        for room in row
    }
    assert shown == {room for room in ROOMS if "/" in room and not room.endswith(".py")}
