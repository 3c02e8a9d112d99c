"""Engines themselves, vLLM on a CPU among them, by `make serving`. Nothing is collected where vLLM is missing."""
