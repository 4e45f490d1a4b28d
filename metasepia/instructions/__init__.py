"""Simplified instruction following (Wu and Varshney, arXiv:2402.12151): `tasks.py` draws functions and instructions,
`model.py` is a causal model with a token table, `measures.py` and `interventions.py` look at its hidden states,
`trial.py` says what one trial is, `work.py` is a pack of them in a sweep; `figures.py` and `report.py` what was found."""
