"""Links: one connection from each replica to each ingress, which carries the chunks of all requests."""
