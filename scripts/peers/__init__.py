"""One workload, written once for each engine that scripts/bench_peers.py compares."""
