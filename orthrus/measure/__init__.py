"""Measurements: `orthrus verify`, `orthrus bench` and `orthrus bench shape`."""
