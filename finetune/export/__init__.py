"""Artefacts that other programs load: merged models, GGUF files, pushed repositories."""
