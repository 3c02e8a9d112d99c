"""The runtime opens and runs compressed checkpoints. All its files but this one are copied into every checkpoint."""
