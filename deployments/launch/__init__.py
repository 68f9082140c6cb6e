"""`orthrus serve`: start Ray and a config on this machine, show the progress, and stop everything."""
