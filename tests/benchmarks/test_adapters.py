"""The benchmark of adapter placement plays fair, counts rightly and writes what it says."""

import itertools
import random

import msgspec
import pytest
from typer import Typer
from typer.testing import CliRunner

from benchmarks import adapters
from benchmarks.adapter_placement import model, study, workload
from benchmarks.adapter_placement.fleet import Fleet
from benchmarks.adapter_placement.peers import Dynamo, Hash, LruPolicy
from benchmarks.adapter_placement.workload import Arrival, Client, Workload

app = Typer()
app.command()(adapters.simulate)


class OnFirst(LruPolicy):
    """Everything goes to the first replica."""

    name = "first"

    def route(self, request, fleet):
        """Zero, always."""
        return 0


def versions(count=model.NUM_VERSIONS, rank=16):
    """Adapters of one rank."""
    return [model.make_version(number, rank, 1.0) for number in range(count)]


def play(arrivals, adapters_=None, policy=None):
    """A fleet after some arrivals."""
    fleet = Fleet(Workload(adapters_ or versions(), arrivals), policy or OnFirst(), 0.0)
    fleet.run()
    return fleet


def test_a_cold_request_waits_for_its_load_and_the_next_does_not():
    """First request: load, slot fill, prompt; second, after it: the prompt alone."""
    one = versions()[0]
    fleet = play([Arrival(1.0, 0, 1000, 1), Arrival(5.0, 0, 1000, 1)])
    cold, warm = fleet.requests
    prompt_s = 1000 / model.LATENCY.prefill_tokens_per_s
    batch_s = one.batch_share / model.LATENCY.decode_tokens_per_s
    assert cold.missed
    assert not warm.missed
    assert cold.load_wait_s == pytest.approx(one.load_s)
    assert cold.ttft_s == pytest.approx(one.load_s + one.activate_s + prompt_s + batch_s)
    assert warm.ttft_s == pytest.approx(prompt_s + batch_s)
    assert fleet.num_loads == 1


def test_loads_of_a_replica_come_one_after_the_other():
    """Two cold adapters at once: the second waits for both loads."""
    fleet = play([Arrival(0.0, 0, 10, 1), Arrival(0.0, 1, 10, 1)])
    first, second = fleet.requests
    assert first.load_wait_s == pytest.approx(versions()[0].load_s)
    assert second.load_wait_s == pytest.approx(2 * versions()[0].load_s)


def test_one_adapter_too_many_evicts_the_least_recently_used():
    """The adapter used longest ago has to be loaded again, the others have not."""
    full = model.MAX_REGISTERED
    arrivals = [Arrival(2.0 * number, number, 10, 1) for number in range(full + 1)]
    at_s = 2.0 * (full + 1)
    fleet = play([*arrivals, Arrival(at_s, 1, 10, 1), Arrival(at_s + 2, 0, 10, 1)])
    assert [request.missed for request in fleet.requests[-2:]] == [False, True]
    assert len(fleet.replicas[0].used_s) == full


def test_a_batch_has_no_more_adapters_than_slots():
    """Sixteen long answers hold all slots: the seventeenth adapter waits for the first to end."""
    count = model.GPU_SLOTS + 1
    warm = [Arrival(1.0 * number, number, 10, 1) for number in range(count)]
    busy = [Arrival(100.0, number, 10, 1000) for number in range(count - 1)]
    fleet = play([*warm, *busy, Arrival(101.0, count - 1, 10, 1)])
    *_, last = fleet.requests
    alone_s = 1000 / model.LATENCY.decode_tokens_per_s
    assert not last.missed
    assert last.ttft_s > alone_s - 1.0


def test_a_decode_step_takes_longer_with_more_adapters():
    """The same sixteen answers end later with sixteen adapters than with one."""
    few = play([Arrival(50.0, 0, 10, 500) for _ in range(16)])
    many = play([Arrival(50.0, number, 10, 500) for number in range(16)])
    assert many.now_s > few.now_s


def test_tokens_are_counted_once():
    """What the replicas served is what was asked, and nothing is left outstanding."""
    rng = random.Random(1)  # noqa: S311
    load = workload.build(workload.zipf_weights(1.0, rng), rng, 20.0, 60.0, 1.0)
    fleet = Fleet(load, Hash(load.versions), 0.0)
    fleet.run()
    asked = sum(one.prompt_tokens + one.output_tokens for one in load.arrivals)
    assert sum(fleet.served_tokens()) == asked
    assert all(one.load_tokens == 0 for one in fleet.replicas)
    assert all(request.ttft_s > 0 for request in fleet.requests)


def test_arrivals_are_the_same_for_the_same_seed():
    """Policies are compared on one list."""

    def build(seed):
        rng = random.Random(seed)  # noqa: S311
        return workload.build(workload.zipf_weights(0.9, rng), rng, 10.0, 100.0, 1.0)

    assert build("a") == build("a")
    assert build("a") != build("b")


def test_popularity_drifts_among_the_hot():
    """From one period to the next some hot adapters change places, and most stay."""
    periods = list(itertools.islice(workload.zipf_weights(1.2, random.Random(3)), 2))  # noqa: S311
    hot = [
        set(sorted(range(model.NUM_VERSIONS), key=lambda one: -weights[one])[: workload.HOT])
        for weights in periods
    ]
    assert len(hot[0] - hot[1]) == workload.NUM_SWAPS
    assert sorted(periods[0]) == sorted(periods[1])


def test_clients_are_active_in_their_share_of_the_periods():
    """A client of 10 % of the windows has weight in about a tenth of the periods, its own weight."""
    rng = random.Random(4)  # noqa: S311
    periods = list(itertools.islice(workload.client_weights([Client(7.0, 0.1)], rng), 40))
    active = [weight for weights in periods for weight in weights if weight]
    assert set(active) == {7.0}
    assert len(active) / (40 * model.NUM_VERSIONS) == pytest.approx(0.1, rel=0.1)


def test_clients_are_read_from_their_table(tmp_path):
    """Requests are spread over the windows in which there were any."""
    path = tmp_path / "clients.csv"
    path.write_text("total_requests,active_windows,windows\n600,3,30\n0,0,30\n")
    assert workload.read_clients(path) == [Client(200.0, 0.1)]


def test_dynamo_counts_copies_as_published():
    """Shares of the slots rounded up, at most one a replica, at least one."""
    dynamo = Dynamo(versions())
    assert dynamo._copies({0: 900, 1: 90, 2: 10}) == {0: 8, 1: 8, 2: 2}
    many = dynamo._copies(dict.fromkeys(range(200), 10))
    assert len(many) == model.NUM_REPLICAS * model.GPU_SLOTS
    assert set(many.values()) == {1}


def test_summary_is_the_mean_with_its_range():
    """Over the seeds of each popularity and policy."""
    outcomes = [
        study.Outcome("0.9", policy, seed, 10, dict.fromkeys(study.METRICS, value))
        for policy, values in (("headrace", (1.0, 3.0)), ("hash", (2.0, 8.0)))
        for seed, value in enumerate(values)
    ]
    summary = study.summarise(outcomes)
    assert summary["0.9"]["hash"]["balance"] == study.Mean(5.0, 2.0, 8.0)
    assert study.verdicts(summary)[0] == "0.9, misses (%): 2.00 is better than 5.00 (hash)"
    header, ours, _ = study.rows(summary["0.9"])
    assert header[1] == "misses (%)"
    assert ours[1] == "2.00 (1.00\N{EN DASH}3.00)"


def test_quick_run_finds_ours_ahead(tmp_path):
    """The command prints a table and writes JSON; on Zipf 1.2 ours has the shortest tail of all, and
    fewer misses than whoever else spreads hot adapters."""
    output = tmp_path / "adapters.json"
    result = CliRunner().invoke(app, ["--quick", "--output", str(output)])
    assert result.exit_code == 0
    assert "| headrace |" in result.stdout
    results = msgspec.json.decode(output.read_bytes(), type=adapters.Results)
    policies = results.simulation.summary["1.2"]
    assert set(policies) == set(study.POLICIES)
    assert len({one.num_requests for one in results.simulation.outcomes}) == 1
    tails = {name: figures["ttft_p99_ms"].mean for name, figures in policies.items()}
    assert min(tails, key=tails.__getitem__) == study.OURS
    misses = {name: figures["miss_percent"].mean for name, figures in policies.items()}
    for other in ("dynamo", "hash, bounded", "all-pods"):
        assert misses[study.OURS] < misses[other]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "magic"], "There is no policy 'magic'"),
        (["--popularity", "steep"], "neither 'servegen' nor a slope"),
        (["--duration-s", "10"], "above the warm-up"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    """One sentence that says what is wrong."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_a_missing_table_of_clients_is_said(tmp_path):
    """The file is named by option and by nothing else."""
    result = CliRunner().invoke(
        app, ["--popularity", "servegen", "--clients", str(tmp_path / "none.csv")]
    )
    assert result.exit_code == 1
    assert "--clients" in result.output
