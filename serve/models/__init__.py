"""Names to models, and texts from them: completions, `auto`, vectors."""
