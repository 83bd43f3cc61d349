"""Finds a basis of each head and how many channels of it a KV cache needs (ZeroC). Knows no engine, no KV format."""
