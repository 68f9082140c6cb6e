"""`orthrus bench serve`: what Ray Serve adds to the engine's own time."""
