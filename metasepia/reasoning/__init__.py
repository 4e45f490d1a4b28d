"""Classification from labelled examples in the request, with no fitting: TART (arXiv:2306.07536).

`module` is the small causal decoder and its compiled path, `training` its recipes, steps and checkpoints, `shipped`
the trained modules on disk; `protocols` says how texts become vectors, `reduction` brings vectors to the module's
dimensions, `context` compiles labelled examples and keeps compiled ones within a bound of bytes.
"""
