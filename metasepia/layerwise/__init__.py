"""Which layers of a backbone tell tasks apart (after Wu and Varshney, arXiv:2402.12151, on any causal model and texts).

`texts.py` reads a folder of tasks and holds templates or texts out; `states.py` runs the backbone once and keeps one
pooled state a text and layer, part by part; `measures.py` scores every layer and the controls into one table;
`figures.py` draws it, `report.py` writes the page.
"""
