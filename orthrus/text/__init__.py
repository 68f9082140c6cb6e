"""Text: between tokens and characters, and what constrains the tokens of an answer."""
