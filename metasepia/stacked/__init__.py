"""Many small decoders of one shape trained as one: every parameter is [models, ...].

`decoder` is a stack of GPT-2 decoders, `block` how one layer of it is computed, `regressor` two token layouts on top,
`training` the optimiser with its rates per model and the loop that freezes a model whose loss is no number, `memory`
what keeps a step's freed memory with the process.
"""
