"""The errors of obstore and of the operating system, as errors of the store.

Owns the translation, once, at the seam. Never retries. Called by `locations.py`.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapters.errors import NotInStore, StoreError, StoreReason

if TYPE_CHECKING:
    from collections.abc import Iterator

# What the errors of obstore and of the operating system say, in words; first match counts.
_REASONS: tuple[tuple[StoreReason, tuple[str, ...]], ...] = (
    ("full", ("os error 28", "os error 122", "code: 507", "QuotaExceeded", "StorageFull")),
    ("forbidden", ("os error 13", "os error 1)", "os error 30", "code: 401", "code: 403")),
    (
        "unreachable",
        (
            "error sending request",
            "timed out",
            "timeout",
            "dns error",
            "onnection",
            "code: 5",
        ),
    ),
)
_S3_MESSAGE = re.compile(r"<Message>(.*?)</Message>", re.DOTALL)
_ADVICE: dict[StoreReason, str] = {
    "unreachable": "cannot be reached",
    "forbidden": "refuses us: check its credentials and permissions",
    "full": "is full",
    "failed": "failed",
}


@contextmanager
def location_errors(url: str) -> Iterator[None]:
    """Translate what is raised in a block that asks a location.

    Args:
        url: Of the location, for the message.

    Raises:
        NotInStore: For an object that is not there.
        StoreError: For everything else that obstore and the system say.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise NotInStore(f"{url} has no such object: {_first_line(error)}.") from error
    except (BaseError, OSError) as error:
        text = _first_line(error)
        reason = _reason(text)
        raise StoreError(f"{url} {_ADVICE[reason]} ({text}).", reason) from error


def _reason(text: str) -> StoreReason:
    for reason, marks in _REASONS:
        if any(mark in text for mark in marks):
            return reason
    return "failed"


def _first_line(error: BaseException) -> str:
    text = str(error).split("\n\nDebug source")[0]
    # S3 explains itself in XML.
    if found := _S3_MESSAGE.search(text):
        text = f"{text.split(': <?xml')[0].rpartition(' - ')[2]}: {found[1]}"
    return " ".join(text.split())[:400].rstrip(". ")
