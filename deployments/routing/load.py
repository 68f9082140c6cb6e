"""What a request will add to a replica's load."""

from orthrus.deployments.replica.reports import Capacity, Load
from orthrus.requests.request import Request

_TYPICAL_OUTPUT_TOKENS = 256
"""Most answers end long before their limit. The replica's reports correct this guess."""


def request_load(request: Request, capacity: Capacity, cached_pages: int = 0) -> Load:
    """What a request will take of a replica that holds `cached_pages` of its prompt."""
    params, prompt = request.params, len(request.prompt)
    most = _TYPICAL_OUTPUT_TOKENS if params.max_tokens is None else params.max_tokens
    output = min(most, _TYPICAL_OUTPUT_TOKENS)
    pages = (prompt + params.n * output) / capacity.page_size - cached_pages
    return Load(params.n, (prompt - cached_pages * capacity.page_size) / capacity.prefill_chunk, pages)
