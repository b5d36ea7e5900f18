"""In-group merge methods, one per file: how deltas are pruned and how a group's become one (arXiv 2412.15283, Eq. 3)."""
