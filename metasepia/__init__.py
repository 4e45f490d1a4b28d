"""The science of Metasepia: no Ray, no DeepSpeed, no server.

`rows`, `steps`, `errors` and `digests` are what every other part shares; they, `prepared`, `experts`, `mixing`,
`dispatch` and `registry` load no torch. `checkpoints` finds and prepares models; `loading` reads a rank's share of one
(`shards`) from its files (`stored`), `families` is how families are cut, `planning` what a rank will hold; `backbone`
is the protocol of a frozen causal model and its one-process reference; `scheduling` (with `inflight`, `room`,
`prefixes` and `leases`) says which rows run in the next step, and with which experts held, `generation` (over `cache`)
runs them; `factors` are the singular factors of a model's weights (made in pieces, `factor_files`), `svf` applies
expert vectors through them (Transformer-squared), `tuning` trains them, `mixing` mixes them, `dispatch` chooses one by
the request; `reasoning` is TART's module and contexts, `synthetic` its tasks and oracles; `encoders` embeds texts;
`registry` keeps names, digests and blobs. `lora` are low-rank adapters beside expert vectors, `peft_files` PEFT's
directories of them, `exporting` makes experts into them and into merged weights; `cli` is the command `metasepia`. This
module imports nothing.
"""
