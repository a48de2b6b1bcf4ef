"""What `tools/benchmark.py` is made of: timing, operators, models, and the report."""
