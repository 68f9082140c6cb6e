"""Prompts for `orthrus verify` and `orthrus bench`: openings of Python functions, written for this project.

They are in no training corpus of ours, so acceptance measured on them is that of new text.
"""

from typing import Any

PROMPTS = (
    'def moving_average(values: list[float], window: int) -> list[float]:\n    """Mean of each run of `window`."""\n',
    "def parse_duration(text):\n    # '1h30m' -> seconds\n    total = 0\n",
    "class RingBuffer:\n    def __init__(self, capacity):\n        self.capacity = capacity\n",
    "import os\nimport sys\n\n\ndef find_duplicates(root):\n    seen = {}\n    for folder, _, files in os.walk(root):\n",
    "def is_balanced(text: str) -> bool:\n    stack = []\n    for char in text:\n        if char in '([{':\n",
    "def merge_intervals(intervals):\n    intervals = sorted(intervals)\n    merged = [intervals[0]]\n    for start, end in",
    "async def fetch_all(urls, limit=8):\n    semaphore = asyncio.Semaphore(limit)\n",
    "class Matrix:\n    def __init__(self, rows):\n        self.rows = rows\n\n    def transpose(self):\n        return",
    "def levenshtein(a, b):\n    previous = list(range(len(b) + 1))\n    for i, x in enumerate(a, 1):\n",
    "def load_config(path):\n    with open(path) as file:\n        config = json.load(file)\n",
    "def test_empty_queue_raises():\n    queue = PriorityQueue()\n    with pytest.raises(",
    "def chunked(iterable, size):\n    batch = []\n    for item in iterable:\n        batch.append(item)\n",
    "class LRUCache(dict):\n    def get(self, key, default=None):\n        try:\n            value = self[key]\n",
    'def roman(number: int) -> str:\n    """Convert an integer to a Roman numeral."""\n    symbols = [',
    "def topological_sort(graph):\n    visited = set()\n    order = []\n\n    def visit(node):\n",
    "for line in sys.stdin:\n    fields = line.rstrip().split('\\t')\n    if len(fields) != 3:\n",
)


def encode_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt, none empty, under a Hugging Face tokenizer."""
    return [ids for text in PROMPTS if (ids := list(tokenizer.encode(text)))]
