"""Failures: what went wrong, as a status and a message for the client."""
