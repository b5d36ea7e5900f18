"""The stages of a run: read a block, call a kernel, write whole chunks or rows, return a receipt."""
