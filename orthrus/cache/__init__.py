"""The paged KV cache: its memory, who owns which page, and what pages are named."""
