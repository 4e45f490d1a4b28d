"""Few-shot search: a mixture of experts for a task, from a few of its questions with their answers.

`cross_entropy` is the method (Transformer-squared, arXiv:2501.06252, section 3.2), `fewshot` runs it against a
backbone as background rows, `jobs` writes a search down so that it survives a kill, `picture` draws one. No torch.
"""
