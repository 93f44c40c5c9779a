"""Which gateways are waited for."""

from __future__ import annotations

import asyncio

from serving.control.acks import MAX_GATEWAYS, GatewayAcks


async def test_waits_for_every_live_gateway() -> None:
    """The wait ends when the last one has the snapshot, and says false when the time is up."""
    acks = GatewayAcks(ttl_s=60)
    assert await acks.wait(5, 0.0)
    with acks.polling("a", 5), acks.polling("b", 4):
        assert not await acks.wait(5, 0.05)

        async def catch_up() -> None:
            with acks.polling("b", 5):
                pass

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            waiting = group.create_task(acks.wait(5, 10))
            group.create_task(catch_up())
        assert waiting.result()


async def test_gateway_that_is_gone_is_not_waited_for() -> None:
    """After its time to live without a poll; one that still polls is live however long that takes."""
    acks = GatewayAcks(ttl_s=0.05)
    with acks.polling("a", 1):
        assert not await acks.wait(2, 0.2)
        assert [ack.version for ack in acks.live()] == [1]
    assert await acks.wait(2, 10)
    assert acks.live() == []


async def test_names_are_bounded() -> None:
    """Gateways that come under ever new names push out the oldest."""
    acks = GatewayAcks(ttl_s=60)
    for number in range(MAX_GATEWAYS + 5):
        with acks.polling(f"g{number}", 1):
            pass
    names = {ack.gateway for ack in acks.live()}
    assert len(names) == MAX_GATEWAYS
    assert "g0" not in names
    assert f"g{MAX_GATEWAYS + 4}" in names
