"""Measurements: generation and single models against PyTorch, each row in a process of its own, in rounds."""
