"""Processes, threads, files, locks and progress."""
