"""How much at once: admission with fair turns, drains, retries, replicas by what waits."""
