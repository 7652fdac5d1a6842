"""The recipe: its schema, reading it, and explaining what is wrong with it."""
