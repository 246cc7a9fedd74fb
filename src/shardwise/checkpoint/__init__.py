"""Checkpoints: any tree, saved on any mesh and layout, restored onto any other.

A crash at any instant leaves the last committed checkpoint whole; damage is never loaded silently.
The promise, the format and recovery by hand are in `docs/checkpoints.md`.
"""

from .errors import CheckpointError as CheckpointError
from .manifest import Manifest as Manifest
from .restore import inspect as inspect
from .restore import latest as latest
from .restore import restore as restore
from .restore import verify as verify
from .save import Pending as Pending
from .save import save as save

__all__ = [
    "CheckpointError",
    "Manifest",
    "Pending",
    "inspect",
    "latest",
    "restore",
    "save",
    "verify",
]
