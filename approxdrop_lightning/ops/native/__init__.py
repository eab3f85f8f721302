"""Compiled CPU kernels (C), their loader, and the buffers and copies built on them."""
