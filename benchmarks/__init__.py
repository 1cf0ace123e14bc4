"""Benchmarks: ``python -m benchmarks SUITE`` prints a table and keeps a JSON; ``bench_<op>.py`` also runs under
pytest."""
