"""Training experts: singular values or low-rank products of a frozen model, on a twin that shares its weights.

`trainable` is what changes, `tuning` the steps, on answers and by REINFORCE (Transformer-squared, arXiv:2501.06252),
`policy` what a step reads of sampled answers, `rollouts` samples them, `teacher_forcing` reads a model's losses.
"""
