"""Measurements: `orthrus verify`, `orthrus bench`, `orthrus bench shape` and `orthrus compare`."""
