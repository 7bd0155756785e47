"""Latency that can be gated on: scenarios, statistics, environment, comparison, gates and reports."""
