"""The process around a run: CUDA or CPU, ranks, signals, logging and error messages. Nothing here knows a model."""
