"""Classification by labelled examples, in a request or by a context made before."""
