"""HTTP, for every API: reading bodies, admitting calls, writing JSON and server-sent events."""
