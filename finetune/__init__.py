"""LoRA and QLoRA fine-tuning: one YAML recipe in, a measured, servable adapter out."""

__version__ = "0.1.0"
