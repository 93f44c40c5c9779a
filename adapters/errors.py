"""The errors of this package, one tree.

    AdapterError
    ├── InvalidAdapter         a file or folder that is not an adapter
    ├── IncompatibleAdapter    an adapter that does not fit where it is wanted
    ├── InvalidBaseModel       a folder that is not a base model
    ├── InvalidName            a name that breaks the grammar of `version.py`
    ├── UploadRefused          what somebody sent is not taken; knows its HTTP status
    └── StoreError             a location or the node's cache cannot do what was asked
        ├── NotInStore         nobody has put that there
        └── CorruptObject      what is there is not what was put

Messages are one sentence for whoever gave the input.
"""

from __future__ import annotations

from typing import Literal


class AdapterError(Exception):
    """Root of the errors of this package."""


class InvalidAdapter(AdapterError):
    """The file or folder is not a LoRA adapter, or is a broken one."""


class IncompatibleAdapter(AdapterError):
    """The adapter is well-formed but does not fit the base model or the engine."""


class InvalidBaseModel(AdapterError):
    """The folder is not a base model's, or cannot be read."""


class InvalidName(AdapterError):
    """The name breaks its grammar."""


class UploadRefused(AdapterError):
    """What was sent as an adapter is not taken, and nothing of it was kept."""

    def __init__(self, message: str, status: Literal[400, 413, 415, 422] = 400) -> None:
        """Say why.

        Args:
            message: One sentence for whoever sent it.
            status: HTTP's: 400 malformed or dangerous, 413 too large, 415 a kind of file that is not
                taken, 422 well-formed but no adapter.
        """
        super().__init__(message, status)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


StoreReason = Literal["unreachable", "forbidden", "full", "failed"]


class StoreError(AdapterError):
    """A location, or the cache of this node, cannot do what was asked."""

    def __init__(self, message: str, reason: StoreReason = "failed") -> None:
        """Say what failed.

        Args:
            message: One sentence for whoever runs the platform.
            reason: What to do by: only "unreachable" is worth another try.
        """
        super().__init__(message, reason)
        self.message = message
        self.reason = reason

    def __str__(self) -> str:
        return self.message


class NotInStore(StoreError):
    """Nobody has put that there, or it was deleted."""


class CorruptObject(StoreError):
    """What is there is not what was put there."""
