"""One thin Ray actor a file over a class of `metasepia`, and `messages`: all that crosses a process border.

`backbone_shard` is one rank, `tensor_parallel` how DeepSpeed cuts its share (the only import of it), `allreduce` the
sum over ranks of one machine, `processes` what a rank says about itself, `gang` the ranks of one process group,
started, watched and killed together, `gang_experts` brings the experts that its scheduler asks for, `backbone` the
gang as one backbone that outlives its ranks, `encoder` a text encoder, `reasoning_pool` the reasoning modules
(`labelled`: vectors to contexts, `audits`: slow work beside), `expert_mixing` the mixer of expert vectors,
`mixture_searches` runs few-shot searches, `centroids` keeps those of tasks seen, `registry` the one writer of the
catalogue and of keys, `keys` the program that makes the first key, `apart` calls that are no part of the
request which makes them.
"""
