"""What a real engine cannot be made to return: routes that are broken, missing or retracted, and aborts that are errors."""

import asyncio
import base64
import dataclasses

import numpy as np
import pytest
from rollouts import random_prompts
from test_nonsense_from_engines_is_refused import GENERATION, GOOD

from megatron_vespo.rollout.engine_output import WeightSpan
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.generate import MAX_FRUITLESS_REQUESTS, generate_group
from megatron_vespo.rollout.response_checks import ResponseError
from megatron_vespo.rollout.segments import LARGE_PAYLOAD
from megatron_vespo.routing.routes import RoutingShape

SHAPE = RoutingShape(moe_layers=(False, True, True), topk=2, num_experts=8)
RESPONSE = 4
(PROMPT,) = random_prompts(1, low=1, high=9)
POSITIONS = len(PROMPT.token_ids) + RESPONSE - 1


def routes(rows: int, seed: int = 0) -> np.ndarray:
    """[rows, layers, topk] int32: two different experts everywhere, the dense layer's place is zero."""
    first = np.random.default_rng(seed).integers(0, 8, (rows, 3, 1))
    experts = np.concatenate([first, (first + 1) % 8], axis=-1).astype(np.int32)
    experts[:, 0] = 0
    return experts


def payload(experts: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(experts, dtype=np.int32).tobytes()).decode()


def changed(place: tuple, value: int) -> str:
    experts = routes(POSITIONS)
    experts[place] = value
    return payload(experts)


WHOLE = dataclasses.replace(
    GOOD,
    token_ids=np.array([3, 4, 5, 6], dtype=np.int32),
    log_probs=np.full(4, -1.0, dtype=np.float32),
    finish_reason="length",
    weight_spans=(WeightSpan("7", 0, 4),),
    routed_experts=payload(routes(POSITIONS)),
)


def part(tokens: int, *, rows: int, version: str = "7", **changes):
    """An aborted request that sampled `tokens` tokens, and returned routes of `rows` positions."""
    spans = (WeightSpan(version, 0, tokens),)
    aborted = {"finish_reason": "abort", "finish_detail": "Aborted", "weight_spans": spans}
    sampled = {"token_ids": WHOLE.token_ids[:tokens], "log_probs": WHOLE.log_probs[:tokens]}
    return dataclasses.replace(WHOLE, **sampled, **(aborted | {"routed_experts": payload(routes(rows))} | changes))


class Answers:
    """In place of a client: the answers to one request after the other, and what was asked."""

    outstanding_tokens, given_version = 0, None

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    async def generate(self, input_ids, sampling_params, request_ids, **options):
        self.asked.append((input_ids[0], sampling_params[0]["max_new_tokens"], request_ids[0], options))
        return [self.answers.pop(0)]


def trajectory(*answers, **changes):
    generation = dataclasses.replace(GENERATION, **({"routes": SHAPE} | changes))
    client = Answers(*answers)
    (found,) = asyncio.run(generate_group(Fleet([client]), PROMPT, generation)).trajectories
    assert not client.answers
    return found, client.asked


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (None, "missing"),
        ("", "missing"),
        (payload(routes(POSITIONS - 1)), "truncated"),
        (payload(routes(POSITIONS))[:-9], "truncated"),
        ("not base64 at all!", "truncated"),
        (payload(np.concatenate([routes(POSITIONS), routes(POSITIONS)], axis=1)), "layers"),
        (changed((3, 1, 0), 8), "range"),
        (changed((3, 2, 1), -1), "range"),
        (changed((slice(5, 6), 1), 3), "duplicates"),
        (changed((slice(None), 2), 0), "zero_layer"),
    ],
)
def test_broken_routes_are_masked_and_counted_and_the_response_is_kept(broken, kind):
    found, _ = trajectory(dataclasses.replace(WHOLE, routed_experts=broken))
    assert found.response_ids.tolist() == [3, 4, 5, 6]
    assert found.engine_routes.masked == {kind: POSITIONS}
    assert found.engine_routes.experts.shape == (POSITIONS, 2, 2) and not found.engine_routes.recorded.any()


def test_sound_routes_are_kept_without_the_dense_layers():
    found, asked = trajectory(WHOLE)
    np.testing.assert_array_equal(found.engine_routes.experts, routes(POSITIONS)[:, 1:])
    assert found.engine_routes.recorded.all() and not found.engine_routes.masked
    assert (found.engine_routes.weight_versions == 7).all()
    assert asked[0][3] == {"return_routed_experts": True, "routed_experts_start_len": 0, "cache_key": None}


def test_large_payloads_are_read_in_a_thread_and_are_the_same():
    prompt = dataclasses.replace(PROMPT, token_ids=np.full(LARGE_PAYLOAD // 24, 3, dtype=np.int32))
    experts = routes(len(prompt.token_ids) + RESPONSE - 1)
    answers = Answers(dataclasses.replace(WHOLE, routed_experts=payload(experts)))
    assert len(answers.answers[0].routed_experts) > LARGE_PAYLOAD
    group = asyncio.run(generate_group(Fleet([answers]), prompt, dataclasses.replace(GENERATION, routes=SHAPE)))
    np.testing.assert_array_equal(group.trajectories[0].engine_routes.experts, experts[:, 1:])


def test_retracted_requests_are_not_trusted():
    found, _ = trajectory(dataclasses.replace(WHOLE, retractions=1), deterministic=False)
    assert found.engine_routes.masked == {"retracted": POSITIONS}


def test_only_the_broken_part_of_a_response_is_masked():
    prompt = len(PROMPT.token_ids)
    last = part(2, rows=2, version="8", finish_reason="length", finish_detail="", request_id="second")
    first = part(2, rows=prompt + 1, routed_experts="broken")
    found, asked = trajectory(first, last, weight_version=None)
    assert found.engine_routes.masked == {"truncated": prompt + 1}
    assert found.engine_routes.recorded.tolist() == [False] * (prompt + 1) + [True] * 2
    assert found.engine_routes.weight_versions[prompt + 1 :].tolist() == [8, 8]
    np.testing.assert_array_equal(found.engine_routes.experts[prompt + 1 :], routes(2)[:, 1:])
    assert [(s.start, s.end, s.weight_version, s.request_id) for s in found.segments] == [
        (0, 2, 7, "r"),
        (2, 4, 8, "second"),
    ]
    (_, _, first_id, _), (input_ids, max_new_tokens, second_id, options) = asked
    assert input_ids == [*PROMPT.token_ids.tolist(), 3, 4] and max_new_tokens == 2
    assert options == {"return_routed_experts": True, "routed_experts_start_len": prompt + 1, "cache_key": None}
    assert second_id == f"{first_id}/1"


def test_an_abort_before_the_next_token_asks_again_for_the_same():
    prompt = len(PROMPT.token_ids)
    nothing = part(0, rows=0, finish_detail="Abort in waiting queue", routed_experts=None, weight_spans=())
    last = part(3, rows=3, finish_reason="length", finish_detail="")
    found, asked = trajectory(nothing, part(1, rows=prompt), nothing, last, weight_version=None)
    assert [(s.start, s.end) for s in found.segments] == [(0, 1), (1, 4)]
    assert [options["routed_experts_start_len"] for *_, options in asked[1:]] == [0, prompt, prompt]
    assert [max_new_tokens for _, max_new_tokens, _, _ in asked] == [4, 4, 3, 3]
    assert len({request_id for _, _, request_id, _ in asked}) == 4
    assert len(found.engine_routes) == POSITIONS and found.engine_routes.recorded.all()


def test_an_abort_at_the_end_of_a_response_asks_for_nothing_more():
    prompt = len(PROMPT.token_ids)
    found, _ = trajectory(part(4, rows=prompt + 3), weight_version=None)
    assert found.finish_reason == "length"
    stopped = {"token_ids": np.array([3, 2], dtype=np.int32)}
    found, _ = trajectory(dataclasses.replace(part(2, rows=prompt + 1), **stopped), weight_version=None)
    assert found.finish_reason == "stop" and found.response_ids.tolist() == [3, 2]


def test_only_an_abort_for_a_pause_goes_on():
    good = part(2, rows=len(PROMPT.token_ids) + 1)
    with pytest.raises(ResponseError, match="the engine ended it: abort Aborted"):
        trajectory(good)  # weights were not to change
    with pytest.raises(ResponseError, match="abort out of memory"):
        trajectory(dataclasses.replace(good, finish_detail="out of memory"), weight_version=None)
    with pytest.raises(ResponseError, match="the engine ended it"):
        trajectory(dataclasses.replace(good, finish_status=503), weight_version=None)
    nothing = part(0, rows=0, weight_spans=())
    with pytest.raises(ResponseError, match="aborted 100 times before its next token"):
        trajectory(*[nothing] * MAX_FRUITLESS_REQUESTS, weight_version=None)
    with pytest.raises(ResponseError, match="which are not optimizer steps"):
        trajectory(part(2, rows=2, version="default"), weight_version=None)


@pytest.mark.parametrize("cached", [0, 5, POSITIONS])
def test_positions_from_a_cache_of_older_weights_are_masked(cached):
    found, _ = trajectory(dataclasses.replace(WHOLE, cached_tokens=cached), cache_version=6)
    assert found.engine_routes.masked == ({"older_cache": cached} if cached else {})
    assert found.engine_routes.weight_versions.tolist() == [6] * cached + [7] * (POSITIONS - cached)
    assert found.engine_routes.recorded.tolist() == [False] * cached + [True] * (POSITIONS - cached)
    found, _ = trajectory(dataclasses.replace(WHOLE, cached_tokens=cached), cache_version=7)
    assert found.engine_routes.recorded.all()
