"""Load on aliases: whole answers, streams and completions, and what proves which weights answered.

Owns the requests and their records. Never changes a platform. Used by: the adapter tests of the
dialects beside this file.
"""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass

import openai

ANSWER_S = 30.0


@dataclass(frozen=True)
class Answer:
    """What one request came to.

    Attributes:
        alias: That it asked for.
        kind: `chat`, `stream` or `completion`.
        model: That the response names.
        text: Its words.
        begun_at: By `time.monotonic()`, as is `ended_at`.
        error: Of a request that failed.
    """

    alias: str
    kind: str
    model: str
    text: str
    begun_at: float
    ended_at: float
    error: Exception | None = None

    def said_version(self, weights):
        """The version whose weights have answered; None where it is none of these.

        Text of chats is the name and the folder that the engine loaded; the text of a list of prompts
        begins with a digest of the files that it read there.

        Args:
            weights: Version → folder and digest.
        """
        if self.kind == "completion":
            found = [v for v, (_, digest) in weights.items() if self.text.split()[0] == digest]
            return found[0] if found else None
        version, _, rest = self.text.partition(" from ")
        path = rest.split(" ")[0]
        return version if weights.get(version, ("", ""))[0] == path else None

    def possible_targets(self, flips):
        """What the alias stood for when it was asked for, and what it was flipped to before the end.

        Args:
            flips: (when it was asked for, when that was answered, version), oldest first.
        """
        before = [version for _, done, version in flips if done <= self.begun_at]
        during = [
            version
            for asked, done, version in flips
            if done > self.begun_at and asked <= self.ended_at
        ]
        return {before[-1], *during}


class DialectLoad:
    """Clients that ask for one alias after the other until told to end; an asynchronous context manager.

    Attributes:
        answers: All so far.
    """

    def __init__(self, url, aliases):
        self._client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S
        )
        self._aliases = aliases
        self.answers = []
        self._is_over = False
        self._moved = asyncio.Event()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self._client.close()

    @asynccontextmanager
    async def running(self, num_clients):
        """Clients ask as long as this lasts; it begins once they have had answers."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_clients):
                tasks.create_task(self._run(number))
            try:
                await self.until_more(2 * num_clients)
                yield
            finally:
                self._is_over = True

    async def _run(self, number):
        turn = number
        while not self._is_over:
            alias = self._aliases[turn % len(self._aliases)]
            kind = ("chat", "stream", "completion")[turn // len(self._aliases) % 3]
            await self.ask(alias, kind)
            turn += 1

    async def ask(self, alias, kind="chat"):
        """One request."""
        begun_at, error, told = time.monotonic(), None, ["", ""]
        try:
            await {"chat": self._chat, "stream": self._stream, "completion": self._completion}[
                kind
            ](alias, told)
        except Exception as caught:  # noqa: BLE001 - the tests assert which there may be
            error = caught
        answer = Answer(alias, kind, told[0], told[1], begun_at, time.monotonic(), error)
        self.answers.append(answer)
        self._moved.set()
        return answer

    async def until_more(self, num_answers):
        """Waits for so many further answers."""
        wanted = len(self.answers) + num_answers
        async with asyncio.timeout(ANSWER_S):
            while len(self.answers) < wanted:
                self._moved.clear()
                await self._moved.wait()

    async def _chat(self, alias, told):
        whole = await self._client.chat.completions.create(model=alias, messages=_messages(alias))
        told[:] = whole.model, whole.choices[0].message.content

    async def _stream(self, alias, told):
        stream = await self._client.chat.completions.create(
            model=alias, messages=_messages(alias), stream=True
        )
        models = set()
        async for chunk in stream:
            models.add(chunk.model)
            told[1] += "".join(choice.delta.content or "" for choice in chunk.choices)
        (told[0],) = models

    async def _completion(self, alias, told):
        whole = await self._client.completions.create(model=alias, prompt=["One of", "several"])
        first, second = (choice.text for choice in whole.choices)
        assert first.split()[0] == second.split()[0]
        told[:] = whole.model, first


def _messages(alias):
    return [{"role": "user", "content": f"What does {alias} say?"}]
