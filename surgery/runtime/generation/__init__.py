"""Generation over ONNX models with transformers' own `generate`: all that `GenerationConfig` offers."""

from __future__ import annotations

from surgery.errors import SurgeryError

try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise SurgeryError(
        f"generating needs torch and transformers: {error}", hint="pip install 'graph-surgery[transformers]'"
    ) from error

from surgery.runtime.generation.cache import OnnxCache
from surgery.runtime.generation.generator import Generator
from surgery.runtime.generation.opening import open_generator

__all__ = ["Generator", "OnnxCache", "open_generator"]
