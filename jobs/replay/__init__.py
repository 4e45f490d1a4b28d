"""An answer recomputed from its receipt and its request: `python -m jobs.replay`, in `__main__`.

`files` reads what a server sent, `parts` finds what the digests name, `vectors` recomputes contexts, classifications
and embeddings, `completions` texts, `report` holds what was compared.
"""
