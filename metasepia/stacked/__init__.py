"""Many small decoders of one shape trained as one: every parameter is [models, ...].

`decoder` holds the GPT-2 blocks and the regressor's core, `regressor` the two token layouts of regression on top,
`training` the optimiser with its rates per model and the loop that freezes a model whose loss is no number.
"""
