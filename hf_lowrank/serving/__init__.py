"""Engines that serve compressed checkpoints; each module imports its engine, and nothing else of the package imports them."""
