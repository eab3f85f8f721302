"""Products of weight tiles that a pattern keeps: definition, autograd and backends."""
