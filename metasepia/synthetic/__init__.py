"""Synthetic tasks that the reasoning module learns from, and what an ideal learner would do on them.

`sampling` draws numbers as pure functions of seed, step and index; `tasks` makes batches of probabilistic logistic
regression (TART, arXiv:2306.07536); `curriculum` says how large they are at each step; `oracles` holds the predictors
that a module is compared with: Bayes-optimal, scikit-learn's logistic regression, and the one that knows w.
"""
