"""For which numbers of rows the runner of GPUs has graphs. Free of torch."""


def graph_sizes(most: int) -> list[int]:
    """The numbers of rows that graphs are captured for, up to the first that is no less than `most`."""
    # From 64 on they fill the linear layers' tiles.
    sizes = [8, 16, 32, 48, 64, 128, *range(256, 1 << 20, 256)]
    last = next(i for i, size in enumerate(sizes) if size >= most)
    return sizes[: last + 1]
