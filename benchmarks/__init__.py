"""The measured claims, re-runnable. Each script prints the other side of its comparison in the same run."""
