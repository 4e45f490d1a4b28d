"""Task embeddings (FUTE, arXiv:2402.14522): `answers` is what a task says of texts, `probes` the texts that black
boxes are asked, `space` the vectors and what keeps them apart. `methods` names the ways to embed: `agreement` (numpy),
`prefix` and `fisher` (over `surrogate`, torch). `nearest` searches, `vendi` measures diversity, `ranking`
orders prompts and source tasks, `store` and `task_map` keep and show embeddings.
"""
