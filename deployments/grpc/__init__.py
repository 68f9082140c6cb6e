"""gRPC: the service `Orthrus`, an adapter over the handler of `generation`."""
