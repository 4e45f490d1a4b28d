"""Synthetic tasks that models learn from in context, and what an ideal learner would do on them.

`sampling` draws numbers as pure functions of seed, step and index; `tasks` makes batches of probabilistic logistic
regression (TART, arXiv:2306.07536) for the reasoning module; `curriculum` says how large they are at each step;
`oracles` holds the predictors that a module is compared with: Bayes-optimal, scikit-learn's logistic regression, and
the one that knows w. `regression` makes linear and logistic regression whose tasks come from a finite pool (Raventos
et al., arXiv:2306.15063), for one model or many at once; `estimators` holds the ideal learners of a pool and of the
true prior. `embeddings` makes tasks as text encoders would see them.
"""
