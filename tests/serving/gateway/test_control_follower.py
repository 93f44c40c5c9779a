"""Following the control plane: what is taken, what is refused, and serving on without it."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING

import pytest
from eventually import eventually
from fake_control import FakeControl, adapter, alias, give, placed, until_resolved, version_of
from gateway_process import gateway_process
from raw_client import get, post

from serving.fleet.registry import FleetRegistry
from serving.gateway import published_file
from serving.gateway.control_follower import read_snapshot
from serving.routing.published import Placement, Published, PublishedVersion, decode, encode

if TYPE_CHECKING:
    from pathlib import Path

    from running_gateway import StartGateway
    from scripted_engine import ScriptedEngine

V1, V2 = version_of("support", "1"), version_of("support", "2")
CHAT = {"model": "help", "messages": []}


async def test_polls_and_acknowledges(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """Each poll names the snapshot in effect, and who asks."""
    give(scripted, V1)
    control.publish({"help": V1}, {V1: adapter(placed(scripted))})
    gateway = await start_gateway(scripted, control=control)
    await eventually(lambda: len(control.polls) == 2)
    first, second = control.polls
    assert (first["epoch"], first["after"]) if "epoch" in first else first["after"] == "0"
    assert (second["epoch"], second["after"]) == ("e1", "1")
    assert first["gateway"] == second["gateway"] != ""
    control.publish({"help": V1}, {V1: adapter(placed(scripted))})
    await eventually(lambda: len(control.polls) == 3)
    assert control.polls[2]["after"] == "2"
    assert gateway.worker.snapshot.adapters is not None
    assert gateway.worker.snapshot.adapters.published.version == 2


async def test_garbage_and_other_databases(
    scripted: ScriptedEngine,
    control: FakeControl,
    start_gateway: StartGateway,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Garbage changes nothing; a new epoch and a smaller number are taken, with a word in the log."""
    caplog.set_level(logging.WARNING)
    give(scripted, V1, V2)
    versions = {V1: adapter(placed(scripted)), V2: adapter(placed(scripted))}
    control.publish({"help": V1}, versions, number=7)
    gateway = await start_gateway(scripted, control=control)
    await until_resolved(gateway, "help", V1)
    bad = [
        b"no json",
        b"{}",
        encode(Published("e1", 9, {}, {"no-digest": adapter()})),
        encode(Published("e1", 9, {}, {V1: adapter(lora_id=0)})),
        encode(Published("e1", 9, {}, {V1: adapter(placed(scripted, path=""))})),
    ]
    for body in bad:
        control.send_garbage(body)
        await eventually(lambda: control.garbage is None)
    await eventually(lambda: caplog.text.count("snapshot refused") == len(bad))
    assert (await gateway.post(CHAT)).json["model"] == V1
    control.publish({"help": V2}, versions, epoch="e2", number=1)
    await until_resolved(gateway, "help", V2)
    assert "control plane has another database" in caplog.text
    control.publish({"help": V2}, versions, epoch="e2", number=5)
    control.publish({"help": V1}, versions, epoch="e2", number=3)
    await until_resolved(gateway, "help", V1)


async def test_serves_on_and_reconnects(
    scripted: ScriptedEngine, control: FakeControl, start_gateway: StartGateway
) -> None:
    """A dead control plane changes nothing; when it is back, the next snapshot is taken."""
    give(scripted, V1, V2)
    versions = {V1: adapter(placed(scripted)), V2: adapter(placed(scripted))}
    control.publish({"help": V1}, versions)
    gateway = await start_gateway(scripted, control=control)
    await until_resolved(gateway, "help", V1)
    await control.die()
    for _ in range(5):
        assert (await gateway.post(CHAT)).json["model"] == V1
    control.publish({"help": V2}, versions)
    await control.listen()
    await until_resolved(gateway, "help", V2)


async def test_cold_start_from_disk(
    scripted: ScriptedEngine, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """With a dead control plane a gateway starts from the last snapshot that another one kept."""
    give(scripted, V1)
    state = tmp_path / "state"
    async with FakeControl() as control:
        published = control.publish({"help": V1}, {V1: adapter(placed(scripted))})
        await start_gateway(scripted, control=control, state_dir=state)
        await eventually(lambda: (state / published_file.NAME).exists())
    assert decode((state / published_file.NAME).read_bytes()) == published
    assert [path.name for path in state.iterdir()] == [published_file.NAME]
    second = await start_gateway(scripted, control=control, state_dir=state)
    answer = await second.post(CHAT)
    assert (answer.status, answer.json["model"]) == (200, V1)
    assert (await second.ask(get("/readyz"))).status == 200


async def test_nothing_to_start_from(
    scripted: ScriptedEngine, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """Without control plane and with a broken file: bases serve, an alias is 503 and not unknown."""
    (tmp_path / published_file.NAME).write_bytes(b"{")
    async with FakeControl() as control:
        pass
    gateway = await start_gateway(scripted, control=control, state_dir=tmp_path)
    assert (await gateway.post({**CHAT, "model": "m"})).status == 200
    assert (await gateway.post(CHAT)).code == "no_replica_available"


async def test_traffic_is_reported(
    scripted: ScriptedEngine,
    control: FakeControl,
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Differences of requests and tokens by version; what a dead control plane missed comes later."""
    monkeypatch.setattr("serving.gateway.control_follower._REPORT_S", 0.02)
    give(scripted, V1, V2)
    versions = {V1: adapter(placed(scripted)), V2: adapter(placed(scripted))}
    control.publish({"help": V1}, versions)
    gateway = await start_gateway(scripted, control=control)
    await until_resolved(gateway, "help", V1)
    assert (await gateway.post(CHAT)).status == 200
    assert (await gateway.post({**CHAT, "model": V1})).status == 200
    await eventually(lambda: _reported(control, V1) == (2, 20))
    await control.die()
    for _ in range(3):
        assert (await gateway.post({**CHAT, "model": V2})).status == 200
    await control.listen()
    await eventually(lambda: _reported(control, V2) == (3, 30))
    assert _reported(control, V1) == (2, 20)
    assert control.reports[0]["gateway"] == control.polls[0]["gateway"]


def _reported(control: FakeControl, version: str) -> tuple[int, int]:
    rows = [report["versions"].get(version) for report in control.reports]
    served = [row for row in rows if row]
    return sum(row["requests"] for row in served), sum(row["tokens"] for row in served)


@pytest.mark.parametrize("workers", [2, 4])
async def test_all_workers_flip(
    scripted: ScriptedEngine, control: FakeControl, tmp_path: Path, workers: int
) -> None:
    """Every worker goes by a snapshot before it is acknowledged; one that is restarted has the newest."""
    give(scripted, V1, V2)
    versions = {V1: adapter(placed(scripted)), V2: adapter(placed(scripted))}
    control.publish({"help": V1}, versions)
    state = tmp_path / "state"
    async with gateway_process(
        tmp_path,
        scripted,
        flags=("--workers", str(workers)),
        HEADRACE_CONTROL_URL=f"http://127.0.0.1:{control.port}",
        HEADRACE_CONTROL_TOKEN="control-token",
        HEADRACE_STATE_DIR=str(state),
    ) as gateway:

        async def answers(version: str, count: int = 12 * workers) -> bool:
            asked = [await gateway.ask(post(CHAT)) for _ in range(count)]
            assert {answer.status for answer in asked} == {200}
            return {answer.json["model"] for answer in asked} == {version}

        await eventually(lambda: control.polls[-1]["after"] == "1")
        assert await answers(V1)
        for number, version in ((2, V2), (3, V1), (4, V2)):
            control.publish({"help": version}, versions)
            await eventually(lambda wanted=str(number): control.polls[-1]["after"] == wanted)
            assert await answers(version)
        before = gateway.workers()
        before[0].kill()
        await eventually(lambda: len(gateway.workers()) == workers)
        await eventually(lambda: before[0] not in gateway.workers())
        await control.die()
        served = 0
        deadline = time.monotonic() + 20
        while served < 12 * workers and time.monotonic() < deadline:
            try:
                answer = await gateway.ask(post(CHAT))
            except (ConnectionError, EOFError):
                served = 0
                continue
            served = served + 1 if answer.json.get("model") == V2 else 0
        assert served == 12 * workers
        gateway.terminate()
        assert await gateway.end() == 0
    assert decode((state / published_file.NAME).read_bytes()).version == 4


def _large(number: int, num_versions: int = 1000) -> Published:
    """Each version is on two of eight replicas."""
    versions = {}
    for each in range(num_versions):
        where = {
            f"127.0.0.1:{9000 + (each + shift) % 8}": Placement("ready", f"/adapters/a{each}")
            for shift in (0, 3)
        }
        versions[f"a{each}@{each:012x}"] = PublishedVersion("m", each + 1, 8, 10**6, where)
    aliases = {f"alias{each}": alias(f"a{each}@{each:012x}") for each in range(num_versions)}
    return Published("e1", number, aliases, versions)


def test_a_thousand_versions_do_not_stall_the_loop() -> None:
    """Reading, checking and applying the next snapshot of a thousand takes less than 5 ms."""
    from serving.config import ReplicaConfig, Resilience

    replicas = [ReplicaConfig.parse(f"vllm=http://127.0.0.1:{9000 + n}") for n in range(8)]
    registry = FleetRegistry(
        replicas, {}, None, lambda snapshot: None, Resilience(), lambda replica: 0.0,
        is_controlled=True,
    )  # fmt: skip
    known = read_snapshot(encode(_large(1)))
    registry.take_published(known)
    best_s = float("inf")
    for number in range(2, 12):
        body = encode(_large(number))
        began = time.perf_counter()
        known = read_snapshot(body, known)
        registry.take_published(known)
        best_s = min(best_s, time.perf_counter() - began)
    assert len(json.loads(body)["versions"]) == 1000
    # The best of ten: what it takes, not what the machine does meanwhile.
    assert best_s < 0.005
