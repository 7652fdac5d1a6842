"""Data: sources -> formats -> template -> masks -> a memory-mapped cache of token samples."""
