"""Side-by-side measurements against what a user would pick instead; each prints a table and writes JSON."""
