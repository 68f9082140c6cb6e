"""How a connection between a replica and an ingress fails."""


class LinkLost(Exception):
    """The connection between a replica and an ingress has ended under a request."""


class ReplicaFailed(LinkLost):
    """The replica has said why it ends, and the connection ends with it."""
