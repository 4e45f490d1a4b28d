"""Hidden states, and the centroids of tasks that the graph keeps of them."""
