"""How commands talk to a running platform: one HTTP client, errors in one line.

Owns: address, key, deadlines and the wording of failures. Never: knows a route. Used by the commands
beside this file that have `--url`.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_URL = "http://127.0.0.1:8000"
EXIT_REFUSED = 1
EXIT_UNREACHABLE = 3
CONNECT_S = 5.0
# Above the longest that the platform lets a request wait (60 s).
ANSWER_S = 90.0

Url = Annotated[
    str, typer.Option("--url", envvar="HEADRACE_URL", help="Where the platform serves.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", envvar="HEADRACE_API_KEY", help="An admin key, where keys are configured."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the platform's answer as JSON.")]


class Refused(Exception):
    """The platform answered with an error.

    Attributes:
        status: HTTP status.
        code: The error's stable identifier, where it has one.
    """

    def __init__(self, message: str, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class PlatformClient:
    """Requests to one platform; use as `with platform(url, key) as client`."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def call(self, method: str, path: str, **request: Any) -> Any:
        """Send a request and return the answer's JSON, None where it has no body.

        Args:
            method: HTTP method.
            path: Below the platform's URL.
            request: As `httpx.Client.request` takes it.

        Raises:
            Refused: If the platform answers with an error.
            httpx.HTTPError: If it does not answer.
        """
        answer = self._client.request(method, path, **request)
        if answer.status_code >= 400:
            raise _refusal(answer)
        return answer.json() if answer.content else None


@contextmanager
def platform(url: str, api_key: str | None) -> Iterator[PlatformClient]:
    """Open a client; what fails ends the command with one line.

    Raises:
        typer.Exit: 1 if the platform refuses, 3 if it cannot be reached.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=timeout) as client:
            yield PlatformClient(client)
    except Refused as error:
        sys.stderr.write(f"headrace: {error}\n")
        raise typer.Exit(EXIT_REFUSED) from None
    except httpx.ConnectError:
        sys.stderr.write(
            f"headrace: nothing answers at {url}: start it by headrace up, or give --url\n"
        )
        raise typer.Exit(EXIT_UNREACHABLE) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        sys.stderr.write(f"headrace: {url} did not answer as a platform does: {reason}\n")
        raise typer.Exit(EXIT_UNREACHABLE) from None


def _refusal(answer: httpx.Response) -> Refused:
    try:
        error = answer.json()["error"]
        return Refused(str(error["message"]), answer.status_code, error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Refused(f"HTTP {answer.status_code} from {answer.url}", answer.status_code, None)
