"""How a connection between a replica and an ingress fails."""


class LinkLost(Exception):
    """The connection between a replica and an ingress has ended under a request."""


class ReplicaFailed(LinkLost):
    """The replica's engine has failed, and the connection ends with the replica. The message says why."""
