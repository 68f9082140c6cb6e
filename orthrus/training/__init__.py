"""Training: a small base model from public Python code, and diffusion heads for any frozen Qwen3."""
