"""What a process needs before any model: CUDA or CPU, ranks, signals, logs, and errors in one line."""
