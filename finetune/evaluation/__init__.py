"""Measuring a model on a task: metrics of completions, before and after training."""
