"""Which units of a layer, or tiles of a weight, a batch keeps, and the sampler that draws them."""
