"""Dropout patterns of units and of weights, and the sampler that draws them."""
