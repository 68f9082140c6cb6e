"""Generation, without any protocol: from a checked body to the chunks of its answer, with failover between replicas."""
