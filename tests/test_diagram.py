"""docs/rooms.svg shows the rooms that there are, and is what its source says."""

import importlib.util

import yaml

from tests.imports import ROOT
from tests.test_arrows import ROOMS

DOCS = ROOT / "docs"


def test_it_is_what_its_source_says() -> None:
    spec = importlib.util.spec_from_file_location("draw_rooms", DOCS / "draw_rooms.py")
    assert spec is not None and spec.loader is not None
    draw_rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_rooms)
    drawn = draw_rooms.drawing((DOCS / "rooms.yaml").read_text(encoding="utf-8"))
    assert drawn == (DOCS / "rooms.svg").read_text(encoding="utf-8"), (
        "docs/rooms.yaml has changed: make diagram"
    )


def test_it_shows_every_room() -> None:
    packages = yaml.safe_load((DOCS / "rooms.yaml").read_text(encoding="utf-8"))["packages"]
    shown = {f"{p['name']}/{room}" for p in packages for row in p["rows"] for room in row}
    shown -= {"cluster/check", "cluster/config"}  # Two files, no folders.
    assert shown == {room for room in ROOMS if "/" in room and not room.endswith(".py")}
