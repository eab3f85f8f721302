"""Pack the kept rows and columns of a dense matrix by group, and unpack them: definition, operators, kernels."""
