"""Compressed checkpoints in the formats of other engines, value for value as far as a format can hold them."""
