"""Optimistic concurrency: a change names the revision that it was made from.

Owns the two ways to say it, `revision` in the body (409) and `If-Match`/`If-None-Match` (412; RFC
9110, section 13.1). Never stores anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.control.errors import InvalidRequest, PreconditionFailed, StaleRevision

_ETAGS = re.compile(r'\s*(?:W/)?"([0-9]{1,18})"\s*')


@dataclass(frozen=True, slots=True)
class Expected:
    """What the caller takes the revision for.

    Attributes:
        body: `revision` of the body; 0 is "does not exist".
        if_match: That header.
        if_none_match: That header; only `*` is taken.
    """

    body: int | None = None
    if_match: str | None = None
    if_none_match: str | None = None

    def check(self, what: str, revision: int) -> None:
        """Compare with the revision as it is.

        Args:
            what: What is changed, for the message.
            revision: As it is; 0 if it does not exist.

        Raises:
            StaleRevision: If the body's differs.
            PreconditionFailed: If a header does not hold.
            InvalidRequest: If a header cannot be read.
        """
        is_now = f"{what} is at revision {revision}" if revision else f"{what} does not exist"
        if self.body is not None and self.body != revision:
            raise StaleRevision(f"{is_now}, not {self.body}: read it again.", param="revision")
        if self.if_none_match is not None:
            if self.if_none_match.strip() != "*":
                raise InvalidRequest("If-None-Match: only '*' is taken.", param="if-none-match")
            if revision:
                raise PreconditionFailed(f"{is_now}, and If-None-Match wants none.")
        if self.if_match is not None and revision not in _matching(self.if_match, revision):
            raise PreconditionFailed(f"{is_now}, which If-Match does not name: read it again.")


def etag(revision: int) -> str:
    """Return the `ETag` of a revision."""
    return f'"{revision}"'


def _matching(header: str, revision: int) -> set[int]:
    if header.strip() == "*":
        return {revision} if revision else set()
    named = set()
    for part in header.split(","):
        match = _ETAGS.fullmatch(part)
        if match is None:
            raise InvalidRequest(
                'If-Match: send the ETag of an earlier answer, e.g. "3".', param="if-match"
            )
        named.add(int(match[1]))
    return named
