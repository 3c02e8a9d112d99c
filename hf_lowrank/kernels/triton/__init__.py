"""GPU back end in Triton, verified in Triton's interpreter only: it has never run on a GPU, so it is off unless asked for."""
