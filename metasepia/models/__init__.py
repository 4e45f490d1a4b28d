"""Frozen causal models on disk and on their way into memory: any Hugging Face directory or GGUF.

`checkpoints` finds, digests, prepares and loads them, `prepared` is what any process may know of a prepared one,
`families` says how each family is cut over ranks, `shards` which part a rank holds, `loading` reads that part alone,
`planning` counts what a rank will hold before there is one. `prepared`, `families` and `planning` load no torch.
"""
