"""Choosing an expert from a request alone, for the model name `auto`: stages that decide or abstain. No torch.

`centroid` takes the nearest task centroid in hidden states, also of those that the graph keeps itself (`observed`);
`dispatcher` asks the base model or a trained dispatch expert which category a text is of (Transformer-squared,
arXiv:2501.06252).
"""
