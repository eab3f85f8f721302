"""C kernels for the CPU: the loader, and the buffers, copies and products built on top."""
