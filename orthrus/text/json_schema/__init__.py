"""JSON Schemas, rewritten so that a grammar can enforce them and every text under them ends."""
