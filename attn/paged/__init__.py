"""Attention over a paged KV cache: the same roles as in the folder above, a file each."""
