"""Running models: ONNX Runtime sessions, and generation on the host."""
