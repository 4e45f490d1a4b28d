"""Few-shot search: a mixture of experts for a task, from a few of its questions with their answers.

`cross_entropy` is the method (Transformer-squared, arXiv:2501.06252, section 3.2), `warm_start` says where it begins
when tasks near the one at hand are known, `fewshot` runs it against a backbone as background rows, `jobs` writes a
search down so that it survives a kill, `picture` draws one. No torch.
"""
