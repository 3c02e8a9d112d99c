"""Measurements of a compressed model: perplexity, fidelity to the dense model, zero-shot tasks and speed."""
