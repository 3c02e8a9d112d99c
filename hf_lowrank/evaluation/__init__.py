"""What was lost and what was gained: perplexity, fidelity to the dense model, zero-shot tasks, speed."""
