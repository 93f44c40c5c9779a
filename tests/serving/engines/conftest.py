"""Requests as a dialect gets them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from serving.engines.base import EngineCall

if TYPE_CHECKING:
    from collections.abc import Callable

RESPONSE_ID = "chatcmpl-01a20e0736ce7c528c83dbd61bc6f738"


@pytest.fixture
def make_call() -> Callable[..., EngineCall]:
    """Makes one; only what a test is about has to be said."""

    def make(
        path: str = "/v1/chat/completions",
        name: str = "m",
        engine_name: str | None = None,
        *,
        response_id: str = RESPONSE_ID,
        sent_name: str | None = None,
        add_usage: bool = False,
    ) -> EngineCall:
        return EngineCall(
            path=path,
            response_id=response_id,
            public_name=name,
            engine_name=engine_name or name,
            sent_name=sent_name or name,
            add_usage=add_usage,
        )

    return make
