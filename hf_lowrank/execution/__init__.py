"""How a run runs, whatever it computes: processes, threads, files, locks, progress."""
