"""The LSTM recurrence over ready-made gate inputs: autograd and backends."""
