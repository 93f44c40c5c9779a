"""The simulated engine's scheduler, in virtual time: what it promises of latency, batches and cache."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.engine_sim.block_hash import CacheKey
from benchmarks.engine_sim.block_pool import BlockPool
from benchmarks.engine_sim.latency import Latency
from benchmarks.engine_sim.scheduler import BatchLimits, Scheduler
from benchmarks.engine_sim.sequence import Sequence

BLOCK = 4
PREFILL, DECODE, SLOWDOWN = 1000.0, 100.0, 0.1
UNIQUE = itertools.count(50_000)


class Run:
    """A scheduler and what it has done, by sequence."""

    def __init__(self, num_blocks=1000, latency=None, **limits):
        self.pool = BlockPool(num_blocks)
        self.latency = latency or Latency(PREFILL, DECODE, SLOWDOWN)
        self.limits = BatchLimits(block_size=BLOCK, **limits)
        self.scheduler = Scheduler(self.limits, self.latency, self.pool)
        self.steps = []
        self.times = {}

    def add(self, prompt, num_output=1, at_s=0.0, key=None):
        """Adds a sequence; a number stands for a prompt of that length that nothing else begins like."""
        tokens = [next(UNIQUE), *range(prompt - 1)] if isinstance(prompt, int) else prompt
        output = list(range(10_000, 10_000 + num_output))
        sequence = Sequence(list(tokens), output, at_s, key or CacheKey())
        self.times[sequence] = []
        self.scheduler.add(sequence)
        return sequence

    def until(self, now_s):
        """Steps through virtual time, each step at its own moment."""
        scheduler = self.scheduler
        while scheduler.next_s is not None and scheduler.next_s <= now_s:
            self.record(scheduler.step(scheduler.next_s))

    def record(self, steps):
        """Notes what steps have sampled."""
        for step in steps:
            self.steps.append(step)
            for sequence, number in step.sampled:
                assert number == len(self.times[sequence]) + 1
                self.times[sequence].append(step.at_s)

    def end(self):
        """Steps until nothing is left to do."""
        self.until(float("inf"))
        return self


def test_time_to_first_token_of_an_empty_engine():
    """It is the prompt's length by the prefill rate; then a token each decode interval."""
    run = Run()
    sequence = run.add(50, num_output=3)
    times = run.end().times[sequence]
    assert times == pytest.approx([0.05, 0.06, 0.07])


def test_chunks_do_not_change_the_time_to_first_token():
    """A prompt that takes several steps takes as long as in one."""
    run = Run(max_num_batched_tokens=16)
    sequence = run.add(50)
    assert run.end().times[sequence] == pytest.approx([0.05])
    assert [step.num_tokens for step in run.steps] == [16, 16, 16, 2]


def test_decode_step_grows_with_the_batch():
    """Each further request lengthens the step by its share."""
    run = Run(latency=Latency(0.0, DECODE, SLOWDOWN))
    sequences = [run.add(8, num_output=2) for _ in range(5)]
    run.end()
    for sequence in sequences:
        assert run.times[sequence] == pytest.approx([0.0, (1 + 4 * SLOWDOWN) / DECODE])


def test_prefill_delays_those_who_decode():
    """A long prompt in the batch is felt by everybody in its step."""
    run = Run()
    first = run.add(10, num_output=3)
    run.add(100, at_s=0.015)
    # Its prompt 10 ms, a step alone 10 ms, a step with the newcomer's prompt 110 ms.
    assert run.end().times[first] == pytest.approx([0.01, 0.02, 0.13])


def test_lateness_of_the_caller_changes_nothing():
    """Called late, it tells the same times, and whoever came meanwhile is not served in the past."""
    exact, late = Run(), Run()
    for run in (exact, late):
        run.sequences = [run.add(10, 5), run.add(30, 5, at_s=0.012)]
    exact.end()
    for now_s in (0.033, 0.07, 0.1, 0.15):
        late.record(late.scheduler.step(now_s))
    for one, other in zip(exact.sequences, late.sequences, strict=True):
        assert late.times[other] == pytest.approx(exact.times[one])


def test_time_that_was_missed_is_lost():
    """A caller that comes back after a long time finds the engine where it left it, not ahead."""
    run = Run()
    sequence = run.add(10, num_output=1000)
    run.record(run.scheduler.step(0.0))
    run.record(run.scheduler.step(60.0))
    assert len(run.times[sequence]) < 20
    assert run.scheduler.next_s > 59.8


def test_first_come_first_served_within_the_batch_limit():
    """No more than `max_num_seqs` run; the others follow in their order."""
    run = Run(max_num_seqs=2)
    sequences = [run.add(10, num_output=2) for _ in range(4)]
    run.until(0.0)
    assert run.scheduler.running == sequences[:2]
    assert list(run.scheduler.waiting) == sequences[2:]
    run.end()
    ends = [run.times[one][-1] for one in sequences]
    assert ends == sorted(ends)
    assert max(len(step.sampled) for step in run.steps) == 2


def test_prefix_hits_shorten_prefill():
    """A prompt that begins like an earlier one computes only what is new, in whole blocks."""
    run = Run()
    run.add(list(range(40)))
    run.end()
    second = run.add([*range(30), *range(100, 110)], at_s=1.0)
    run.end()
    assert second.num_cached == 28
    assert run.times[second] == pytest.approx([1.0 + 12 / PREFILL])
    assert sum(step.num_hit_tokens for step in run.steps) == 28


def test_a_whole_hit_still_computes_one_token():
    """The last token is never taken from the cache: there is nothing to sample from otherwise."""
    run = Run()
    run.add(list(range(40)))
    run.end()
    again = run.add(list(range(40)), at_s=1.0)
    run.end()
    assert again.num_cached == 36


def test_answers_are_cached_too():
    """The next turn of a conversation finds the prompt and the answer."""
    run = Run()
    first = run.add(list(range(20)), num_output=13)
    run.end()
    turn = run.add([*first.prompt, *first.output, 1, 2, 3], at_s=1.0)
    run.end()
    assert turn.num_cached == 32


@pytest.mark.parametrize(
    "other", [CacheKey(("la", "/la")), CacheKey(None, "salt"), CacheKey(("la", "/la-v2"))]
)
def test_adapter_path_and_salt_separate_caches(other):
    """The same tokens under another adapter, path or salt are not a hit."""
    run = Run()
    keys = [CacheKey(), CacheKey(("lb", "/la")), other, other]
    hits = []
    for number, key in enumerate(keys):
        sequence = run.add(list(range(40)), at_s=float(number), key=key)
        run.end()
        hits.append(sequence.num_cached)
    assert hits == [0, 0, 0, 36]


def test_least_recently_used_prefix_is_evicted():
    """When the cache is full the prefix that was used longest ago goes, last block first."""
    run = Run(num_blocks=30)
    prompts = [[number, *range(39)] for number in range(3)]
    for at_s, number in enumerate((0, 1, 2, 0)):
        run.add(prompts[number], at_s=float(at_s))
        run.end()
    run.add([7, *range(39)], at_s=10.0)
    run.end()
    hits = []
    for at_s, number in ((20.0, 0), (21.0, 2)):
        sequence = run.add(prompts[number], at_s=at_s)
        run.end()
        hits.append(sequence.num_cached)
    assert hits == [36, 36]
    evicted = [one for step in run.steps for one in step.removed]
    assert len(evicted) >= 10
    lost = run.add(prompts[1], at_s=30.0)
    run.end()
    assert lost.num_cached < 36


def test_blocks_that_are_held_are_never_evicted():
    """Who finds no block waits until somebody has ended."""
    run = Run(num_blocks=25)
    first = run.add(80, num_output=4)
    second = run.add(80, num_output=1)
    run.until(0.0)
    assert run.scheduler.running == [first]
    run.end()
    assert run.times[second][0] > run.times[first][-1]


def test_preemption():
    """Who grows without room makes the latest one give up its blocks and begin again."""
    run = Run(num_blocks=12)
    first = run.add(20, num_output=20)
    second = run.add(20, num_output=20)
    run.end()
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    assert len(run.times[first]) == len(run.times[second]) == 20
    assert sum(step.num_preempted for step in run.steps) == 1


def test_adapters_beyond_the_limit_wait():
    """Only `max_loras` adapters run at once; requests behind are not held up."""
    run = Run(max_loras=1)
    keys = [CacheKey(("a", "/a")), CacheKey(("b", "/b")), CacheKey(("a", "/a")), CacheKey()]
    sequences = [run.add(8, num_output=3, key=key) for key in keys]
    run.until(0.0)
    assert run.scheduler.running == [sequences[0], sequences[2], sequences[3]]
    assert run.scheduler.num_deferred == 1
    run.end()
    assert len(run.times[sequences[1]]) == 3


def test_abort_frees_at_once():
    """An aborted sequence gets no token, and its blocks are free."""
    run = Run()
    sequence = run.add(40, num_output=10)
    waiting = run.add(40, num_output=10, at_s=5.0)
    run.until(0.0)
    assert run.pool.num_used == 10
    run.scheduler.abort(sequence)
    run.scheduler.abort(waiting)
    assert run.pool.num_used == 0
    run.end()
    assert run.times[sequence] == []
    assert run.scheduler.next_s is None


ARRIVALS = st.lists(
    st.tuples(
        st.integers(1, 60),  # prompt, in tokens
        st.integers(1, 20),  # answer, in tokens
        st.floats(0, 0.2, allow_nan=False),  # after the one before, in seconds
        st.booleans(),  # whether it begins like the others
        st.sampled_from([None, "a", "b", "c"]),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(ARRIVALS, st.integers(1, 8), st.integers(8, 64), st.integers(20, 80))
def test_invariants(arrivals, max_num_seqs, max_tokens, num_blocks):
    """Whatever comes: all end, in bounds, without a pause while there is work, and leave nothing."""
    run = Run(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        max_loras=2,
    )
    at_s, sequences = 0.0, []
    for number, (prompt, answer, gap_s, is_shared, adapter) in enumerate(arrivals):
        at_s += gap_s
        run.until(at_s)
        first = 0 if is_shared else number + 1
        key = CacheKey(None if adapter is None else (adapter, "/path"))
        sequences.append(run.add([first, *range(prompt - 1)], answer, at_s, key))
    run.end()
    for sequence in sequences:
        times = run.times[sequence]
        assert len(times) == len(sequence.output)
        assert times == sorted(times)
        assert times[0] > sequence.arrived_s
    assert all(len(step.sampled) <= max_num_seqs for step in run.steps)
    assert all(0 < step.num_tokens <= max_tokens for step in run.steps)
    assert run.pool.num_used == 0
    assert run.pool.num_cached <= num_blocks
    assert run.scheduler.next_s is None
    # Work conserving: a step begins when the one before ends, or when somebody comes to an idle engine.
    for before, step in itertools.pairwise(run.steps):
        if step.begun_s != before.at_s:
            left = [one for one in sequences if one.arrived_s < step.begun_s]
            assert all(run.times[one][-1] <= before.at_s for one in left)
            assert any(one.arrived_s == step.begun_s for one in sequences)
    # Every block that was stored is in the cache still or was said to be removed.
    stored = sum(len(one.hashes) for step in run.steps for one in step.stored)
    removed = sum(len(step.removed) for step in run.steps)
    assert stored - removed == run.pool.num_cached
