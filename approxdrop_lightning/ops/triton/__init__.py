"""What all Triton kernels share: tilings, launches, ahead-of-time compilation."""
