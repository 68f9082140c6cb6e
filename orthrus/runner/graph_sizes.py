"""The numbers of rows for which the runner of GPUs has graphs. Does not import torch."""


def graph_sizes(most: int) -> list[int]:
    """The numbers of rows that graphs are captured for, ascending. The last is the first that is at least `most`."""
    # From 64 on, these numbers fill the tiles of the linear layers.
    sizes = [8, 16, 32, 48, 64, 128, *range(256, 1 << 20, 256)]
    last = next(i for i, size in enumerate(sizes) if size >= most)
    return sizes[: last + 1]
