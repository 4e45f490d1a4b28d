"""The science of Metasepia: no Ray, no DeepSpeed, no server.

`rows` and `errors` hold the values and failures that every other part shares (no torch). `backbone` is the protocol of
a frozen causal model and its one-process reference; `generation` decodes rows; `svf` factors weights and applies expert
vectors (Transformer-squared); `mixing` mixes them; `reasoning` is TART's module and contexts; `synthetic` its tasks and
oracles; `encoders` embeds texts; `registry` keeps names, digests and blobs; `checkpoints` reads and caches models.
This module imports nothing.
"""
