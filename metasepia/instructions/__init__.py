"""Simplified instruction following (Wu and Varshney, arXiv:2402.12151): `tasks.py` draws functions and instructions,
`model.py` is a causal model with a token table, `measures.py` and `interventions.py` look at its hidden states.
`trial.py` is one run's settings, `profiles.py` the sweeps that have a name; a sweep trains packs of runs (`work.py`),
`results.py` reads its table, `figures.py` and `report.py` show what was found.
"""
