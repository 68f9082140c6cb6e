"""Runners: how a pass is run, from row groups to picks."""
