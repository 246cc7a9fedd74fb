"""Rows of the kernels' benchmark: `rows(copy)` of each family beside this file."""
