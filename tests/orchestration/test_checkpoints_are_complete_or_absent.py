"""A checkpoint bears its name when all of it is there; what is kept is what was asked for; what was cut is found."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.config import CheckpointConfig, ConfigError
from megatron_vespo.data.prompt import Prompt
from megatron_vespo.orchestration.checkpoints import complete, complete_checkpoints, prune, require_whole
from megatron_vespo.orchestration.resume import changed, is_free
from megatron_vespo.rollout.trajectory import Segment, Trajectory
from megatron_vespo.rollout.trajectory_file import read_trajectories, write_trajectories
from megatron_vespo.routing.routes import Routes


def written(run: Path, step: int) -> Path:
    partial = run / "checkpoints" / f"step_{step:08d}.partial"
    (partial / "policy").mkdir(parents=True)
    (partial / "policy" / "weights").write_bytes(b"x" * step)
    (partial / "progress.json").write_text("{}")
    return partial


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(run)]


def test_only_what_is_complete_bears_a_name(tmp_path):
    partial = written(tmp_path, 3)
    assert steps(tmp_path) == []
    sizes = complete(partial)
    assert steps(tmp_path) == [3] and not partial.exists()
    assert sizes == {"policy/weights": 3, "progress.json": 2}
    (tmp_path / "checkpoints" / "step_00000004").mkdir()  # not ours: it has no list of files
    assert steps(tmp_path) == [3]


def test_a_complete_checkpoint_is_never_written_over(tmp_path):
    """At no moment is there none of that step: a resumed run takes later ones away before it begins."""
    complete(written(tmp_path, 3))
    again = written(tmp_path, 3)
    (again / "policy" / "weights").write_bytes(b"other")
    with pytest.raises(OSError, match="not empty"):
        complete(again)
    (checkpoint,) = complete_checkpoints(tmp_path)
    require_whole(checkpoint)
    assert (checkpoint / "policy" / "weights").read_bytes() == b"xxx"


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep_last": 1}, [12]),
        ({"keep_last": 3}, [8, 10, 12]),
        ({"keep_last": 2, "keep_every": 4}, [4, 8, 10, 12]),
        ({"keep_last": 9}, [2, 4, 6, 8, 10, 12]),
    ],
)
def test_what_is_kept_is_what_was_asked_for(tmp_path, keep, left):
    for step in range(2, 13, 2):
        complete(written(tmp_path, step))
    prune(tmp_path, CheckpointConfig(**keep))
    assert steps(tmp_path) == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


@pytest.mark.parametrize(("damage", "said"), [("cut", "1 bytes, was saved with 5"), ("gone", "missing")])
def test_a_file_that_was_lost_or_cut_is_named(tmp_path, damage, said):
    complete(written(tmp_path, 5))
    (checkpoint,) = complete_checkpoints(tmp_path)
    require_whole(checkpoint)
    weights = checkpoint / "policy" / "weights"
    weights.write_bytes(b"x") if damage == "cut" else weights.unlink()
    with pytest.raises(ConfigError, match=f"policy/weights: {said}"):
        require_whole(checkpoint)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    complete(written(tmp_path, 5))
    (checkpoint,) = complete_checkpoints(tmp_path)
    (checkpoint / "complete.json").write_text(json.dumps({"format": 7, "files": {}}))
    with pytest.raises(ConfigError, match="format 7"):
        require_whole(checkpoint)


def test_more_steps_are_free_only_at_a_constant_rate():
    assert is_free("algorithm.steps") and not is_free("algorithm.steps", constant_rate=False)


def test_every_changed_setting_is_found_with_its_path():
    before = {"seed": 1, "policy": {"ranks": 2, "layout": {"ep": 2}}, "data": {"sources": [{"task": "a"}]}}
    now = {"seed": 2, "policy": {"ranks": 2, "layout": {"ep": 1}, "new": 0}, "data": {"sources": [{"task": "b"}]}}
    assert list(changed(before, now)) == [
        ("seed", 1, 2),
        ("policy.layout.ep", 2, 1),
        ("policy.new", None, 0),
        ("data.sources", [{"task": "a"}], [{"task": "b"}]),
    ]
    free = [key for key, _, _ in changed(before, now) if is_free(key)]
    assert free == ["policy.layout.ep", "policy.new"]
    assert not is_free("policy.reference.path") and not is_free("policyx") and is_free("observability")


def some_routes(positions: int, expert_type: type) -> Routes:
    random = np.random.default_rng(positions)
    recorded = random.random(positions) < 0.7
    experts = random.integers(0, np.iinfo(expert_type).max, (positions, 3, 2), endpoint=True).astype(expert_type)
    versions = random.integers(0, 2**31 - 1, positions, dtype=np.int32)
    return Routes(experts, recorded, versions, {"older_cache": int((~recorded).sum())} if positions % 2 else {})


def trajectory(number: int, tokens: int, with_scores: bool, with_routes: bool = False) -> Trajectory:
    random = np.random.default_rng(number)
    positions = number // 2 + tokens

    def values() -> np.ndarray:
        return random.normal(size=tokens).astype(np.float32)

    return Trajectory(
        prompt=Prompt(f"sum/{number // 2}", "Größe?\n", np.arange(number // 2 + 1, dtype=np.int32), 1, reference=None),
        sample=number % 2,
        response_ids=random.integers(0, 300, tokens).astype(np.int32),
        behavior_log_probs=values(),
        segments=[Segment(0, tokens, 7, "request")],
        finish_reason="length" if number % 3 else "stop",
        text='"quoted" \u2028 text',
        reward=float(random.normal()),
        outcome="graded",
        trained=bool(number % 2),
        advantage=float("nan") if number == 3 else float(random.normal()),
        proximal_log_probs=values() if with_scores else None,
        engine_log_weights=np.full(tokens, -np.inf, dtype=np.float32) if with_scores else None,
        engine_routes=some_routes(positions, np.uint8) if with_routes else None,
        proximal_routes=some_routes(positions, np.uint16) if with_routes and number % 3 else None,
    )


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=6), with_scores=st.booleans())
def test_trajectories_come_back_bit_for_bit(tmp_path_factory, lengths, with_scores):
    folder = tmp_path_factory.mktemp("trajectories")
    saved = [trajectory(number, tokens, with_scores, routes) for number, (tokens, routes) in enumerate(lengths)]
    write_trajectories(saved, folder)
    found = read_trajectories(folder)
    assert len(found) == len(saved)
    for one, other in zip(saved, found, strict=True):
        for field in dataclasses.fields(Trajectory):
            ours, theirs = getattr(one, field.name), getattr(other, field.name)
            if isinstance(ours, np.ndarray):
                assert ours.dtype == theirs.dtype
                np.testing.assert_array_equal(ours, theirs)
            elif isinstance(ours, Routes):
                assert ours.masked == theirs.masked
                for part in ("experts", "recorded", "weight_versions"):
                    assert getattr(ours, part).dtype == getattr(theirs, part).dtype
                    np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))
            elif field.name == "prompt":
                assert (ours.identity, ours.text, ours.source) == (theirs.identity, theirs.text, theirs.source)
                assert ours.token_ids.tolist() == theirs.token_ids.tolist()
            else:
                assert ours == theirs or (ours != ours and theirs != theirs)
    assert len({id(t.prompt) for t in found}) == len({t.prompt.identity for t in saved})
