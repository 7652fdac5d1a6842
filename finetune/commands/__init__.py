"""One file a verb of the `finetune` command; each has `configure(parser)` and `run(arguments)`.

Importing such a file imports nothing heavy, so that `--help` answers at once: torch is imported inside `run`.
"""
