"""Engines that serve compressed checkpoints.

Each module imports its engine. No other part of the package imports these modules.
"""
