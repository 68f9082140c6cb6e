"""Hugging Face's `generate` on the engine: `orthrus.accelerate`."""
