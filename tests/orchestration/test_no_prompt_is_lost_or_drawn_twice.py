"""Prompts whose groups end in any order: a stream that goes on from any state draws each of the others once."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st
from small_session import Counting

from megatron_vespo.orchestration.drawn_prompts import DrawnPrompts


@given(st.integers(0, 10**6), st.lists(st.integers(1, 25), min_size=1, max_size=4))
def test_each_is_done_once_over_any_number_of_interruptions(seed, lives):
    random, done, position, passed = Random(seed), [], 0, []
    for draws in [*lives, 60]:
        stream = Counting(position)
        drawn = DrawnPrompts(stream, passed)
        running: dict[int, str] = {}
        for number in range(draws):
            running[number] = drawn.take(number).identity
            while running and random.random() < 0.6:
                done.append(running.pop(random.choice(sorted(running))))
            if random.random() < 0.2:
                drawn.state(running)  # a checkpoint that nothing goes on from
        state, passed = drawn.state(running)
        position = state["position"]
    assert len(done) == len(set(done))
    assert set(map(int, done)) | set(map(int, running.values())) == set(range(stream.position))
