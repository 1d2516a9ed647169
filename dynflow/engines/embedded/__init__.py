"""The embedded engine: one SQLite file, one writer thread, nothing to set up."""

from dynflow.engines.embedded.engine import EmbeddedEngine
from dynflow.engines.env import Env

__all__ = ["EmbeddedEngine", "Env"]
