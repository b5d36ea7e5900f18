"""Recipe, plan, kernels and stages: how experts become an artifact."""
