"""Choosing an expert from a request alone, for the model name `auto`: stages that decide or abstain. No torch.

`centroid` takes the nearest task centroid in hidden states, also of those that the graph keeps itself (`observed`);
`task` the nearest registered data set in a text encoder's space, with a level of abstention that is kept; `dispatcher`
asks the base model or a trained dispatch expert which category a text is of (Transformer-squared, arXiv:2501.06252).
"""
