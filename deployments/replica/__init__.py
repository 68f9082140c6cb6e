"""The replica: a deployment that owns one engine, and what it reports of itself."""
