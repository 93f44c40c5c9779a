"""Asks one replica for its answer to the golden prompts, through a gateway and its normal relay path.

Owns the request, and what its failures mean: nobody to ask, or an engine that does not answer as it
should. Never judges (`adapters/golden.py` does). Called by `replica_sync.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import httpx

from adapters.golden import (
    GOLDEN_PROMPTS,
    NUM_TEXT_TOKENS,
    NUM_TOP_TOKENS,
    fingerprint,
    text_fingerprint,
)
from serving.engines.lora import redacted, said

if TYPE_CHECKING:
    from adapters.golden import Fingerprint

PROBE_HEADER = "x-headrace-probe-replica"
PROBE_S = 60.0
CONNECT_S = 3.0
_NOT_NOW = (401, 403, 404, 421, 429, 503)


class ProbeWaits(Exception):
    """Nothing can be said of the replica now: no gateway, or one that does not know it yet."""


class ProbeFailed(Exception):
    """The replica did not answer as an engine that has the version."""


class Prober(Protocol):
    """Whoever can ask a replica through a gateway."""

    async def ask(self, replica: str, model: str) -> Fingerprint:
        """Return the fingerprint of a replica's answer in a model's name.

        Raises:
            ProbeWaits: If nobody can ask now.
            ProbeFailed: If the replica does not answer as it should.
        """


class GatewayProber:
    """Probes by `POST /v1/completions` to the gateway; use as an asynchronous context manager."""

    def __init__(self, gateway_url: str, token: str, timeout_s: float = PROBE_S) -> None:
        """Know where to ask.

        Args:
            gateway_url: `http://HOST:PORT`.
            token: What the gateway knows the control plane by.
            timeout_s: Deadline of one probe.
        """
        self._client = httpx.AsyncClient(
            base_url=gateway_url,
            headers={"authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            # A connection a probe: workers share the port, and each has to know the placement.
            limits=httpx.Limits(max_keepalive_connections=0),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        """Open."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, replica: str, model: str) -> Fingerprint:
        """Ask for logprobs; where the engine gives none, for greedy text.

        Raises:
            ProbeWaits: If no gateway answers, or it does not relay there now.
            ProbeFailed: If the engine does not answer as it should.
        """
        choices = await self._choices(replica, model, max_tokens=1, logprobs=NUM_TOP_TOKENS)
        tops = [_top(choice) for choice in choices]
        try:
            if all(tops):
                return fingerprint([top for top in tops if top])
            texts = await self._choices(replica, model, max_tokens=NUM_TEXT_TOKENS)
            return text_fingerprint([str(choice.get("text", "")) for choice in texts])
        except ValueError as error:
            raise ProbeFailed(str(error)) from error

    async def _choices(self, replica: str, model: str, **extra: int) -> list[dict[str, Any]]:
        body = {"model": model, "prompt": list(GOLDEN_PROMPTS), "temperature": 0, **extra}
        try:
            answer = await self._client.post(
                "/v1/completions", json=body, headers={PROBE_HEADER: replica}
            )
        except httpx.ReadTimeout:
            raise ProbeFailed("The replica did not answer a probe in time.") from None
        except (httpx.HTTPError, OSError) as error:
            told = redacted(str(error)) or type(error).__name__
            raise ProbeWaits(f"No gateway answers, so that it cannot be proven: {told}.") from None
        if answer.status_code == 200:
            return _read(answer)
        if "logprobs" in extra and answer.status_code == 400 and "logprob" in answer.text:
            return [{}]
        message = said(answer.content)
        if answer.status_code in _NOT_NOW:
            raise ProbeWaits(f"The gateway does not relay a probe there now: {message}")
        raise ProbeFailed(f"A probe was answered with {answer.status_code}: {message}")


def _read(answer: httpx.Response) -> list[dict[str, Any]]:
    try:
        choices: list[dict[str, Any]] = answer.json()["choices"]
        return sorted(choices, key=lambda choice: int(choice["index"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ProbeFailed("A probe was answered with something that is no completion.") from error


def _top(choice: dict[str, Any]) -> dict[str, float] | None:
    """The most probable first tokens of one choice, or None where there are none."""
    try:
        tops = choice["logprobs"]["top_logprobs"][0]
        return {str(text): float(logprob) for text, logprob in tops.items()} or None
    except (KeyError, TypeError, IndexError, AttributeError, ValueError):
        return None
