"""Products of rows and columns that a pattern keeps: definition, autograd and backends."""
