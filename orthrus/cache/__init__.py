"""The paged KV cache: its memory, the owners of its pages, and the hashes by which pages are found again."""
