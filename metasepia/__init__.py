"""The science of Metasepia: no Ray, no DeepSpeed, no server.

The ground that every part stands on: `rows` are the values a backbone is asked with and answers with, `errors`,
`digests`, `stored` (tensors in safetensors files), `local_disk`, `packing` and `matrices` (frozen weights as this
machine multiplies by them fastest). `registry` keeps names, digests and blobs, `access` keys and what they use,
`encoders` embeds texts and `modalities` pictures and sounds, `backbone` is the protocol of a frozen causal model and
its one-process reference, `cli` the command `metasepia`. `models` finds, cuts and loads frozen models, `experts` adapts
them, `decoding` runs rows through them, `search` finds mixtures of experts, `dispatch` chooses one by the request,
`training` makes them; `reasoning` is TART's module and contexts, `synthetic` its tasks and oracles. This module imports
nothing.
"""
