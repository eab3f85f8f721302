"""Infrastructure shared by the Triton kernels: tilings, launches, ahead-of-time compilation."""
