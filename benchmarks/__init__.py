"""Measurements that take minutes; `python -m benchmarks.<name>` writes benchmarks/results/<name>.{json,md}."""
