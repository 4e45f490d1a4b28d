"""Task diversity (Raventos et al., arXiv:2306.15063): how varied must pretraining be before a model leaves the Bayesian
estimator of its own tasks for the one of all tasks? `trial.py` is one model's settings, `profiles.py` the sweeps that
have a name and their axes; `work.py` trains a pack of models at once and measures them with `measures.py`. `results.py`
reads a finished table, `crossing.py` finds the number of tasks at which models cross over, `findings.py` says what
a sweep shows and which bounds hold; `figures.py` draws, `report.py` writes the page.
"""
