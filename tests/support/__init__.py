"""Helpers that test files share: models, texts, processes, and a Hub on this machine."""
