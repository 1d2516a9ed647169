"""The engine's contracts on a Temporal server; needs the extra `dynflow[temporal]`."""
