"""Pure functions on arrays; they know no file, no recipe and no cluster."""
