"""vLLM's real engine on a CPU, by `make serving`. Nothing is collected here where vLLM is not installed."""
