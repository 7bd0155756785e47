"""Scoring cameras around the clock: sources, readers, the scoring loop, sinks, operations."""
