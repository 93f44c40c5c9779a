"""How an engine is told to load, unload and list adapters: one `LoraEngine` an engine, beside this file.

Owns the requests and what their answers mean: success, try again, or never. Never retries, keeps no
state, routes no client. Called by `serving/control/replica_sync.py`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from serving.fleet.http_client import get, post_json

if TYPE_CHECKING:
    import ssl

    from serving.config import EngineKind
    from serving.fleet.http_client import Got

LIST_S = 10.0
MAX_REASON_CHARS = 300
_PATH = re.compile(r"(?<![\w<])/[^\s'\",:;)\]]+")


class LoraFailure(Exception):
    """The engine did not do it.

    Attributes:
        reason: One sentence, without paths.
        is_terminal: Whether trying again is of no use before it is started otherwise.
        may_have: Whether it may have done it all the same.
    """

    def __init__(self, reason: str, *, is_terminal: bool = False, may_have: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.is_terminal = is_terminal
        self.may_have = may_have


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """One replica, as its adapters are managed.

    Attributes:
        api_key: Sent as a bearer token.
        tls: How it is verified; None is plain HTTP.
    """

    name: str
    host: str
    port: int
    api_key: str | None = None
    tls: ssl.SSLContext | None = None


class Listing(NamedTuple):
    """What a replica says that it has.

    Attributes:
        base: Its base model's public name.
        adapters: Name → path; None where the engine's kind lists none.
        max_registered: How many adapters it may know, where it says so.
        gpu_slots: How many one batch may mix, where it says so.
    """

    base: str
    adapters: dict[str, str] | None
    max_registered: int | None = None
    gpu_slots: int | None = None


class LoraEngine(ABC):
    """The adapters of one kind of engine.

    Attributes:
        load_s: Deadline of a load.
        unload_s: Deadline of an unload.
    """

    kind: EngineKind
    load_s = 120.0
    unload_s = 30.0

    async def listing(self, target: LoraTarget) -> Listing:
        """Ask what a replica has.

        Raises:
            OSError: If it does not answer in time, or not with a list of models.
        """
        got = await ask(target, "/v1/models", LIST_S)
        if got.status != 200:
            raise OSError(f"its list of models came with status {got.status}")
        try:
            cards = msgspec.json.decode(got.body)["data"]
            bases = [str(card["id"]) for card in cards if card.get("parent") is None]
            adapters = {
                str(card["id"]): str(card.get("root") or "")
                for card in cards
                if card.get("parent") is not None
            }
            return Listing(bases[0], adapters)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise OSError("its list of models cannot be read") from error

    @abstractmethod
    async def load(self, target: LoraTarget, version: str, path: str) -> None:
        """Have a replica load a version; one that it has already is success.

        Raises:
            LoraFailure: If it does not.
        """

    @abstractmethod
    async def unload(self, target: LoraTarget, version: str) -> None:
        """Have a replica forget a version; one that it does not have is success.

        Raises:
            LoraFailure: If it does not.
        """


async def ask(target: LoraTarget, path: str, timeout_s: float) -> Got:
    """GET a path of a replica.

    Raises:
        OSError: If it does not answer in time.
    """
    try:
        return await get(
            target.host,
            target.port,
            path,
            timeout_s=timeout_s,
            api_key=target.api_key,
            tls=target.tls,
        )
    except UnicodeError as error:  # a host that cannot be a name
        raise OSError("its host is not a name") from error


async def tell(target: LoraTarget, path: str, fields: dict[str, Any], timeout_s: float) -> Got:
    """POST to a replica.

    Raises:
        LoraFailure: If it does not answer in time, or refuses the key.
    """
    try:
        got = await post_json(
            target.host,
            target.port,
            path,
            msgspec.json.encode(fields),
            timeout_s=timeout_s,
            api_key=target.api_key,
            tls=target.tls,
        )
    except TimeoutError:
        reason = f"The engine did not answer {path} within {timeout_s:g} s."
        raise LoraFailure(reason, may_have=True) from None
    except (OSError, UnicodeError) as error:
        reason = f"The engine did not answer {path}: {redacted(str(error))}."
        raise LoraFailure(reason, may_have=True) from None
    if got.status in (401, 403):
        raise LoraFailure("The engine refused the API key of the control plane.", is_terminal=True)
    return got


def said(body: bytes) -> str:
    """Return the sentence of an engine's answer, in whichever shape it has, without paths."""
    text = body.decode(errors="replace")
    try:
        told: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return redacted(text)
    for key in ("error", "error_message", "message", "detail"):
        if isinstance(told, dict) and told.get(key):
            told = told[key]
    return redacted(told if isinstance(told, str) else text)


def redacted(text: str) -> str:
    """Return a text on one line, cut, with every path taken out."""
    return _PATH.sub("<path>", " ".join(text.split()))[:MAX_REASON_CHARS]
