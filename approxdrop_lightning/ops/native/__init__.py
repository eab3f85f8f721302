"""C kernels for the CPU: their loader, and the buffers, copies and products built on them."""
