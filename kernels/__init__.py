"""Triton kernels on local tensors, each with a plain-torch twin. Import the defining module."""
