"""Schedules: which rows a decoding sequence puts into the next pass, and which tokens it commits from the result.

A new schedule is one new file here and one entry in `orthrus.schedules.registry`. `orthrus.schedules.protocol` defines the
interface. The forward pass, the cache, the sampler and the scheduler are the same for all schedules.
"""
