"""Base models: finding, loading, quantizing them, and attaching adapters."""
