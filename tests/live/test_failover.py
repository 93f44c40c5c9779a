"""Two real engines, one of them killed under load: nothing that had not begun to answer fails."""

import asyncio
from dataclasses import dataclass

import openai
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_CLIENTS = 16
STREAM_TOKENS = 64
"""Much longer than a whole answer, so that streams are in the middle when those end."""
WHOLE_TOKENS = 16
DEADLINE_S = 180.0
ENDED_BEFORE = 20
"""Requests that have ended when the engine is killed."""
ENDED_AFTER = 32
BEGUN_STREAMS = 2
"""Streams that the engine has begun when it is killed."""
CHAT = "/v1/chat/completions"
NOTICED_WITHIN_S = 10.0


@dataclass
class Outcome:
    """What one request came to."""

    is_stream: bool
    max_tokens: int
    num_chunks: int = 0
    num_tokens: int = 0
    finish_reason: str | None = None
    error: Exception | None = None

    @property
    def is_whole(self):
        has_all = self.finish_reason == "length" and self.num_tokens == self.max_tokens
        return self.error is None and has_all


class Load:
    """Clients that ask one request after the other: chat as a stream, completions whole."""

    def __init__(self, gateway):
        self.gateway = gateway
        self.outcomes = []
        self.is_over = False
        self.moved = asyncio.Event()

    async def client(self, openai_client, number):
        while not self.is_over:
            is_stream = number % 4 < 2
            outcome = Outcome(is_stream, STREAM_TOKENS if is_stream else WHOLE_TOKENS)
            try:
                await self.ask(openai_client, number, outcome)
            except Exception as error:  # noqa: BLE001 - its type is what the test asserts
                outcome.error = error
            self.outcomes.append(outcome)
            self.moved.set()

    async def ask(self, openai_client, number, outcome):
        options = {
            "model": self.gateway.model,
            "max_tokens": outcome.max_tokens,
            "extra_body": {"ignore_eos": True},
        }
        if not outcome.is_stream:
            answer = await openai_client.completions.create(prompt=f"{number},", **options)
            outcome.finish_reason = answer.choices[0].finish_reason
            outcome.num_tokens = answer.usage.completion_tokens
            return
        async for chunk in await openai_client.chat.completions.create(
            messages=[{"role": "user", "content": f"Count from {number}."}],
            stream=True,
            stream_options={"include_usage": True},
            **options,
        ):
            outcome.num_chunks += 1
            for choice in chunk.choices:
                outcome.finish_reason = choice.finish_reason or outcome.finish_reason
            if chunk.usage is not None:
                outcome.num_tokens = chunk.usage.completion_tokens

    async def ended(self, count):
        while len(self.outcomes) < count:
            self.moved.clear()
            await self.moved.wait()


async def run_load(gateway, while_running):
    """Runs all clients until `while_running` returns; every request that was begun ends."""
    load = Load(gateway)
    async with (
        asyncio.timeout(DEADLINE_S),
        openai.AsyncOpenAI(
            base_url=f"{gateway.url}/v1", api_key=gateway.api_key, max_retries=0, timeout=DEADLINE_S
        ) as client,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(NUM_CLIENTS):
            tasks.create_task(load.client(client, number))
        await while_running(load)
        load.is_over = True
    return load.outcomes


async def test_killed_engine(engine, daemons, start_second_engine, wait_until_serving, until):
    """An engine that dies under load costs only the streams that it had begun; then it returns."""
    second, daemon = start_second_engine()
    gateway = daemons.start_gateway("gateway-of-two", [engine, second])

    def served(replica):
        return gateway.num_ended(replica=replica.name, code="200")

    def is_healthy(replica):
        return gateway.metric("headrace_replica_healthy", replica=replica.name) == 1

    until(lambda: is_healthy(engine) and is_healthy(second), DEADLINE_S, "both replicas are known")

    def are_at_work():
        begun = gateway.metric(
            "headrace_time_to_first_token_seconds_count", endpoint=CHAT, replica=second.name
        )
        ended = gateway.num_ended(endpoint=CHAT, replica=second.name)
        return served(engine) and served(second) and begun - ended >= BEGUN_STREAMS

    async def kill_under_load(load):
        await load.ended(ENDED_BEFORE)
        await asyncio.to_thread(until, are_at_work, DEADLINE_S, "both engines are at work")
        await asyncio.to_thread(daemon.kill_group)
        await load.ended(len(load.outcomes) + ENDED_AFTER)

    outcomes = await run_load(gateway, kill_under_load)

    failed = [outcome for outcome in outcomes if outcome.error is not None]
    # Nothing that had not begun to answer fails; what had begun ends with one error of OpenAI's.
    assert [outcome for outcome in failed if outcome.num_chunks == 0] == []
    assert {type(outcome.error) for outcome in failed} <= {openai.APIError}
    assert {outcome.error.code for outcome in failed} <= {"upstream_error"}
    # Never silently short.
    whole = [outcome for outcome in outcomes if outcome.error is None]
    assert [outcome for outcome in whole if not outcome.is_whole] == []
    assert len(whole) >= ENDED_BEFORE + ENDED_AFTER - len(failed)
    assert len(failed) >= 1
    assert gateway.metric("headrace_retries_total") > 0

    until(lambda: not is_healthy(second), NOTICED_WITHIN_S, "the dead replica is out")
    before_first, before_second = served(engine), served(second)
    outcomes = await run_load(gateway, lambda load: load.ended(NUM_CLIENTS))
    assert all(outcome.is_whole for outcome in outcomes)
    assert served(second) == before_second
    assert served(engine) == before_first + len(outcomes)

    daemon.start()
    wait_until_serving(daemon, second)
    until(lambda: is_healthy(second), NOTICED_WITHIN_S, "the replica is back")
    outcomes = await run_load(gateway, lambda load: load.ended(2 * NUM_CLIENTS))
    assert all(outcome.is_whole for outcome in outcomes)
    assert served(second) > before_second
