"""How labelled texts become the vectors of a sequence (the embedding protocols of TART, arXiv:2306.07536).

`stream`: each text is embedded alone, mean over its tokens. No label and no other example enters a vector, so a query's
vector is the same in every context and may be cached by its text.
"""

STREAM = "stream"
