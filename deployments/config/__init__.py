"""A Serve config file: its `args`, and checks of all that can be wrong before anything starts."""
