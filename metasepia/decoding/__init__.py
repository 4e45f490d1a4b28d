"""Rows in continuous batches on one tensor-parallel rank, and the scheduler that rank 0 runs for all.

`scheduling` says which rows run in the next step, over `inflight` (its rows and their bounds), `leases` (the experts
held), `prefixes` (what was read once for many rows) and `room` (what fits); `steps` is what it tells the ranks, and
none of them loads torch. `generation` runs the steps, over `live` (rows in bands), `cache` (their keys and values),
`choices` (the next token) and `fused_model` (the forward of Llama-shaped models). `engine` is both in one process;
`asking` makes the verbs of a backbone out of one stream of answers, here and for a gang's owner.
"""
