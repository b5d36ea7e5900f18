"""Training of the router that picks an expert per query."""
