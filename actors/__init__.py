"""One thin Ray actor a file over a class of `metasepia`, and `messages`: all that crosses a process border.

`backbone_shard` is one tensor-parallel rank (the only import of DeepSpeed), `backbone` the gang of all ranks as one
backbone, `encoder` a text encoder, `reasoning_pool` the reasoning modules, `expert_mixing` the mixer of expert vectors,
`registry` the one writer of the catalogue.
"""
