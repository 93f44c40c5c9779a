"""What the control plane tells the gateways: aliases, adapter versions and where each is proven.

The wire format of `GET /internal/v1/snapshot` and of the copy on a gateway's disk. Owns the shapes and
their bytes; never decides anything. Written by `serving/control`, read by `serving/gateway`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PlacementState = Literal["loaded", "ready", "draining"]
"""`loaded`: the engine has it, only probes may use it. `ready`: a probe has proven it; clients are
routed. `draining`: it is about to be unloaded, nobody new is routed."""


class Placement(msgspec.Struct, frozen=True):
    """One version on one replica.

    Attributes:
        state: Who may use it.
        path: Its folder as the engine sees it.
    """

    state: PlacementState
    path: str


class PublishedVersion(msgspec.Struct, frozen=True):
    """One adapter version.

    Attributes:
        base: Public name of its base model.
        lora_id: Unique positive number (TensorRT-LLM's cache is keyed by it alone).
        rank: Of its largest module.
        size_bytes: Of its files.
        placements: Replica name (`host:port`) → where it stands there.
    """

    base: str
    lora_id: int
    rank: int
    size_bytes: int
    placements: dict[str, Placement]


class PublishedAlias(msgspec.Struct, frozen=True):
    """A public model name.

    Attributes:
        target: Version name (`name@digest12`) or a base model's public name.
        created_at_s: Unix time.
        owner: Shown as `owned_by`.
    """

    target: str
    created_at_s: int
    owner: str = "headrace"


class Published(msgspec.Struct, frozen=True):
    """Everything, at one moment.

    Attributes:
        epoch: Identity of the control plane's database: numbers of another one do not compare.
        version: Grows by one with every change.
        aliases: Alias → what it points at.
        versions: `name@digest12` → version. Holds every version that may be asked for, loaded or not.
    """

    epoch: str = ""
    version: int = 0
    aliases: dict[str, PublishedAlias] = msgspec.field(default_factory=dict)
    versions: dict[str, PublishedVersion] = msgspec.field(default_factory=dict)


def encode(published: Published) -> bytes:
    """Return its JSON."""
    return msgspec.json.encode(published)


def decode(text: bytes) -> Published:
    """Read what `encode` wrote.

    Raises:
        ValueError: If it is not that (`msgspec.DecodeError` is a ValueError).
    """
    return msgspec.json.decode(text, type=Published)
