"""What a frozen model is adapted by, and how rows go through it: Transformer-squared (arXiv:2501.06252) and LoRA.

As files and values, without torch: `vectors` are expert vectors, `lora` low-rank adapters, `peft_files` PEFT's
directories of them, `shipped` those in the package, `mixing` mixes either, `transfer` puts an expert onto another
backbone. `factors` are the singular factors of a model's weights (made in pieces, `factor_files`), `exporting` makes
experts into adapters and merged weights. At run time `svf` attaches to a model: `held` keeps the experts (their
singular values flat in `singular`, adapters stacked in `low_rank`), `selection` says what the next forward uses,
`batch_parts` makes it of rows with their adapters, `expert_linear` and `fused_mlp` apply it.
"""
