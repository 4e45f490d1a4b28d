"""One request: its body read and bounded, its deadline, its id; its answer, whole, streamed or refused."""
