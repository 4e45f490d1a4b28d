"""Choosing an expert from a request alone, for the model name `auto`: stages that decide or abstain. No torch.

`centroid` takes the nearest task centroid in hidden states, `dispatcher` asks the base model or a trained dispatch
expert which category a text is of (Transformer-squared, arXiv:2501.06252).
"""
