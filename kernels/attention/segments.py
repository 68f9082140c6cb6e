"""How the keys of a row are cut into segments, and these into spans: see `work_list`."""

SPAN = 2048
"""Keys of a span."""


def segment_start(index: int) -> int:
    """First key of a segment: 8 of 128 keys, 14 of 512 (from 1,024), 24 of 1,024 (from 8,192), then 2,048 each."""
    if index < 22:
        return index * 128 if index < 8 else 1024 + (index - 8) * 512
    return 8192 + (index - 22) * 1024 if index < 46 else 32768 + (index - 46) * 2048


def num_segments(keys: int) -> int:
    """How many segments hold the first `keys` keys."""
    if keys <= 8192:
        return -(-keys // 128) if keys <= 1024 else 8 + -(-(keys - 1024) // 512)
    return 22 + -(-(keys - 8192) // 1024) if keys <= 32768 else 46 + -(-(keys - 32768) // 2048)


def nearest_segment(keys: int) -> int:
    """The segment whose start is nearest to `keys`."""
    segment = num_segments(keys)
    if segment > 0 and keys - segment_start(segment - 1) < segment_start(segment) - keys:
        segment -= 1
    return segment


def spans_from(begin: int) -> int:
    """The first key from which on an item whose first segment is `begin` writes one record per span: where a span begins."""
    return -(-segment_start(begin) // SPAN) * SPAN


def ends_spans(keys: int, begin: int, end: int) -> list[bool]:
    """For each record that segments begin .. end - 1 of `keys` keys write: whether it is the last of its span.

    There is one record per segment up to the first key at which a span begins, and one per span from there on.
    """
    ends: list[bool] = []
    for behind in range(begin + 1, end + 1):
        at = segment_start(behind)
        ends_span = at % SPAN == 0 or behind == num_segments(keys)
        if ends_span or behind == end or at <= spans_from(begin):
            ends.append(ends_span)
    return ends
