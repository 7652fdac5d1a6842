"""Using a trained model: completions of prompts, and loading a run from its directory."""
