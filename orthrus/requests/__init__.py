"""Requests: what a client asks for, what it gets, and the state of a sequence while the engine works on it."""
