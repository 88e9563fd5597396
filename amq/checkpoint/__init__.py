"""A quantized model on disk (docs/format.md)."""
