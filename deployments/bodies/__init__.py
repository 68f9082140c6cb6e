"""The bodies of requests that every API shares: fields, their checks, and constraints on the answer."""
