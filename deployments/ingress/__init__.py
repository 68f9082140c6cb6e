"""The ingress: the deployment that clients reach, with its FastAPI application."""
