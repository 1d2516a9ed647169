"""The Temporal engine: durable workflows on a Temporal server, run by any number of processes.

Needs the extra `dynflow[temporal]`.
"""

from dynflow.engines.temporal.blobs import Blobs, FolderBlobs
from dynflow.engines.temporal.engine import TemporalEngine

__all__ = ["Blobs", "FolderBlobs", "TemporalEngine"]
