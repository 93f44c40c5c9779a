"""Adapters on two real engines under load: flips, crashes and restarts never give a wrong answer."""

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

sys.path.append(str(Path(__file__).parent))

from adapter_platform import (
    HEADRACE,
    MODEL,
    WORDS,
    AdapterPlatform,
    make_word_adapters,
    said_word,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

NUM_FLIPS = 50
NUM_CLIENTS = 6
ANSWER_TOKENS = 4
STREAM_TOKENS = 24
SETTLE_S = 120.0
RESTART_S = 300.0
SWING = "swing"


@dataclass(frozen=True)
class Answer:
    """What one request came to.

    Attributes:
        alias: That it asked for.
        model: That the response names.
        text: Its words.
        begun_at: By `time.monotonic()`.
        error: Of a request that failed.
    """

    alias: str
    model: str
    text: str
    begun_at: float
    error: Exception | None = None


class MixedLoad:
    """Clients that ask for one alias after the other, whole answers and streams, until told to end."""

    def __init__(self, url, aliases):
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120.0
        )
        self.aliases = aliases
        self.answers = []
        self.is_over = False
        self.moved = asyncio.Event()

    async def run(self, number):
        turn = number
        while not self.is_over:
            alias = self.aliases[turn % len(self.aliases)]
            answer = await self.ask(alias, turn, is_stream=turn % 3 == 0)
            self.answers.append(answer)
            self.moved.set()
            turn += 1

    async def ask(self, alias, turn, *, is_stream):
        begun_at = time.monotonic()
        messages = [{"role": "user", "content": f"Question {turn}: what is it?"}]
        text, model = "", ""
        try:
            if not is_stream:
                whole = await self.client.chat.completions.create(
                    model=alias, messages=messages, max_tokens=ANSWER_TOKENS, temperature=0
                )
                return Answer(alias, whole.model, whole.choices[0].message.content, begun_at)
            models = set()
            async for chunk in await self.client.chat.completions.create(
                model=alias, messages=messages, max_tokens=STREAM_TOKENS, temperature=0, stream=True
            ):
                models.add(chunk.model)
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
            (model,) = models
            return Answer(alias, model, text, begun_at)
        except Exception as error:  # noqa: BLE001 - the test asserts that there is none
            return Answer(alias, model, text, begun_at, error)

    async def until_more(self, num_answers):
        """Waits for so many further answers."""
        wanted = len(self.answers) + num_answers
        async with asyncio.timeout(SETTLE_S):
            while len(self.answers) < wanted:
                self.moved.clear()
                await self.moved.wait()


class Word:
    """Which word each version and each alias stands for."""

    def __init__(self, platform, folders):
        self.of_version = {}
        for word in WORDS:
            alias = SWING if word == "red" else None if word == "blue" else word
            name = SWING if word in ("red", "blue") else word
            self.of_version[platform.push(folders[word], name, alias)] = word
        self.version = {word: version for version, word in self.of_version.items()}
        self.aliases = [SWING, *(word for word in WORDS if word not in ("red", "blue"))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_word_adapters(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def platform(session_daemons, folders, tmp_path_factory):
    started = AdapterPlatform(session_daemons, tmp_path_factory.mktemp("platform"))
    started.start().wait()
    yield started
    if started.daemon.is_running:
        started.daemon.end()


@pytest.fixture(scope="module")
def words(platform, folders):
    return Word(platform, folders)


def check(answers, words):
    """No request failed, and each answer is the one of the version that it names."""
    assert [answer for answer in answers if answer.error is not None] == []
    wrong = [a for a in answers if said_word(a.text) != words.of_version.get(a.model)]
    assert wrong == []
    named = {(a.alias, words.of_version[a.model]) for a in answers if a.alias != SWING}
    assert named <= {(word, word) for word in WORDS}


async def put_alias(client, alias, target):
    """Flips an alias; the answer, which comes once it is flipped."""
    answer = await client.put(
        f"/admin/v1/aliases/{alias}", json={"target": target}, params={"wait_s": 60}
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["target"] == target
    return answer.json()


async def test_fifty_flips_under_load(platform, words):
    """An alias flipped fifty times: no failure, no wrong version, and none late."""
    load = MixedLoad(platform.server.url, words.aliases)
    flipped = []
    async with (
        httpx.AsyncClient(base_url=platform.server.url, timeout=90.0) as client,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(NUM_CLIENTS):
            tasks.create_task(load.run(number))
        await load.until_more(3 * NUM_CLIENTS)
        for turn in range(NUM_FLIPS):
            word = "blue" if turn % 2 == 0 else "red"
            asked_at = time.monotonic()
            await put_alias(client, SWING, words.version[word])
            flipped.append((asked_at, time.monotonic(), word))
            after = await load.ask(SWING, turn, is_stream=False)
            load.answers.append(after)
            assert (after.model, said_word(after.text)) == (words.version[word], word)
        load.is_over = True
    await load.client.close()
    check(load.answers, words)
    for answer in load.answers:
        if answer.alias == SWING:
            assert words.of_version[answer.model] in possible_words(answer, flipped)


def possible_words(answer, flipped):
    """Words that the alias stood for between a request's begin and its resolution, soon after."""
    before = [word for asked, done, word in flipped if done <= answer.begun_at]
    around = [
        word
        for asked, done, word in flipped
        if asked <= answer.begun_at + 1.0 and done > answer.begun_at
    ]
    return {before[-1] if before else "red", *around}


async def test_stream_ends_on_the_version_that_it_began_with(platform, words):
    """A stream that is under way when the alias flips goes on with the version before."""
    async with (
        httpx.AsyncClient(base_url=platform.server.url, timeout=90.0) as client,
        openai.AsyncOpenAI(base_url=f"{platform.server.url}/v1", api_key="none") as ours,
    ):
        await put_alias(client, SWING, words.version["red"])
        text, models = "", set()
        stream = await ours.chat.completions.create(
            model=SWING,
            messages=[{"role": "user", "content": "Go on."}],
            max_tokens=64,
            temperature=0,
            stream=True,
        )
        async for chunk in stream:
            if not models:
                await put_alias(client, SWING, words.version["blue"])
            models.add(chunk.model)
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert models == {words.version["red"]}
    assert said_word(text) == "red"


async def test_rollback_is_a_flip(platform, words):
    """`adapters rollback` goes back to what the alias pointed at, and requests follow at once."""
    async with httpx.AsyncClient(base_url=platform.server.url, timeout=90.0) as client:
        await put_alias(client, SWING, words.version["red"])
        await put_alias(client, SWING, words.version["blue"])
    answer = platform.run("rollback", SWING)
    assert answer["target"] == words.version["red"]
    load = MixedLoad(platform.server.url, words.aliases)
    after = await load.ask(SWING, 0, is_stream=False)
    await load.client.close()
    assert said_word(after.text) == "red"


def test_models_lists_aliases_with_their_parents(platform, words):
    """`/v1/models` has the base and each alias, with version and base; engines' names stay hidden."""
    cards = {card["id"]: card for card in json.loads(platform.server.get("/v1/models")[1])["data"]}
    assert set(cards) == {MODEL, *words.aliases}
    assert cards["river"]["root"] == words.version["river"]
    assert cards["river"]["parent"] == MODEL


async def test_a_killed_replica_gets_its_adapters_back(platform, words, until):
    """A replica killed under load: nothing wrong is answered, and it is back with its adapters."""
    load = MixedLoad(platform.server.url, words.aliases)
    async with asyncio.TaskGroup() as tasks:
        for number in range(NUM_CLIENTS):
            tasks.create_task(load.run(number))
        await load.until_more(2 * NUM_CLIENTS)
        platform.kill("vllm-0")
        await load.until_more(2 * NUM_CLIENTS)
        await asyncio.to_thread(
            until, lambda: platform.num_starts("vllm-0") == 2, RESTART_S, "the engine is back"
        )
        await load.until_more(4 * NUM_CLIENTS)
        load.is_over = True
    await load.client.close()
    # Streams that had begun on the killed engine cannot be whole; everything else is.
    cut = [a for a in load.answers if a.error is not None and a.text]
    assert len(cut) <= NUM_CLIENTS
    check([a for a in load.answers if a not in cut], words)


async def test_serves_on_while_the_control_plane_is_dead(platform, words, until):
    """The control plane is killed: aliases answer on; it comes back and takes changes."""
    load = MixedLoad(platform.server.url, words.aliases)
    platform.kill("control")
    answers = [await load.ask(alias, 1, is_stream=False) for alias in words.aliases]
    check(answers, words)
    until(lambda: platform.num_starts("control") >= 2, SETTLE_S, "the control plane is back")
    async with httpx.AsyncClient(base_url=platform.server.url, timeout=90.0) as client:
        await put_alias(client, SWING, words.version["blue"])
    after = await load.ask(SWING, 2, is_stream=False)
    await load.client.close()
    assert said_word(after.text) == "blue"


async def test_a_gateway_starts_cold_from_its_snapshot(platform, words, daemons, tmp_path):
    """A new gateway without control plane and database serves the aliases of its folder's snapshot."""
    (snapshot,) = platform.state_dir.rglob("published.json")
    state = tmp_path / "state"
    kept = state / snapshot.relative_to(platform.state_dir)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(snapshot.read_bytes())
    server = daemons.server()
    replicas = json.loads(platform.server.get("/readyz")[1])["replicas"]
    argv = [*HEADRACE, "gateway", "--listen", server.name]
    for name in replicas:
        argv += ["--replica", f"vllm=http://{name}"]
    nothing = daemons.server()
    env = {
        **os.environ,
        "HEADRACE_STATE_DIR": str(state),
        "HEADRACE_CONTROL_URL": nothing.url,
        "HEADRACE_CONTROL_TOKEN": "nobody-listens-there",
    }
    cold = daemons.start("cold-gateway", argv, env)
    cold.wait_ready(lambda: server.get("/readyz")[0] == 200, SETTLE_S)
    load = MixedLoad(server.url, words.aliases)
    answers = [await load.ask(alias, 1, is_stream=False) for alias in words.aliases]
    await load.client.close()
    check(answers, words)


async def test_everything_restarted_serves_the_same_aliases(platform, words):
    """The whole platform ended and started again on its folder: each alias answers as before."""
    assert platform.daemon.end() == 0
    platform.start().wait()
    load = MixedLoad(platform.server.url, words.aliases)
    answers = [await load.ask(alias, 1, is_stream=False) for alias in words.aliases]
    await load.client.close()
    check(answers, words)
    assert {a.alias: words.of_version[a.model] for a in answers}[SWING] == "blue"
