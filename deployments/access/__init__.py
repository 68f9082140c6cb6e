"""Access: API keys, rate limits, and the gate that admits each call."""
