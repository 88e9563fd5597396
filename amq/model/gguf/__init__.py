"""GGUF files: what they say, and their conversion to a folder that transformers opens."""
