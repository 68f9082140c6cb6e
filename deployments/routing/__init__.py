"""Routing: which replica gets a request, and when. It knows nothing of Ray Serve."""
