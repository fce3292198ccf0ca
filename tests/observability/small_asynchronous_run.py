"""The rows of a small asynchronous run, in the order and of the shape in which the loop writes them."""

from small_run import (
    CONFIG,
    asynchronous_row,
    evaluation_row,
    mismatch_row,
    rollout_row,
    routes_of_probe,
    routes_of_step,
    step_row,
    sync_row,
    weights,
)

SYNC_EVERY, MAX_STALENESS, STEPS = 4, 8, 12
ONLY_SYNCHRONOUS = ("time/generate", "time/reward_wait", "prompt/", "advantage/")
CONFIG = {
    **CONFIG,
    "algorithm": {
        **CONFIG["algorithm"],
        "steps": STEPS,
        "staleness": 1,
        "asynchronous": {"sync_every": SYNC_EVERY, "max_staleness": MAX_STALENESS, "mismatch_every": 1},
    },
}


def oldest_age(step: int) -> int:
    """Of the first step's data none is old; later it is as old as the bound allows, whatever the place in a period."""
    return min(step - 1, MAX_STALENESS)


def ages(step: int) -> list[int]:
    """Of 16 trajectories: half of them as old as any of the step, half of them half as old."""
    return [oldest_age(step) if index % 2 else oldest_age(step) // 2 for index in range(16)]


def rows(routes: bool = False):
    """(kind, step, values) in the order of a run."""
    yield "sync", 0, sync_row(0)
    yield "evaluation", 0, evaluation_row("before", 0.25)
    for step in range(1, STEPS + 1):
        period, within = divmod(step - 1, SYNC_EVERY)
        row = {name: value for name, value in rollout_row(period).items() if not name.startswith(ONLY_SYNCHRONOUS)}
        yield "rollout", step - 1, {**row, **asynchronous_row(), "time/wait": 0.5}
        row = {**step_row(period, oldest_age(step)), "mini_batch": within}
        yield "step", step, {**row, **(routes_of_step(oldest_age(step)) if routes else {})}
        if step % SYNC_EVERY == 0 and step < STEPS:
            yield "sync", step, sync_row(step)
            difference = {"mismatch/mean_abs": 3e-6, "mismatch/k3": 4e-12}
            yield "mismatch", step, {**mismatch_row(), **difference, **(routes_of_probe(period) if routes else {})}
    yield "sync", STEPS, sync_row(STEPS)
    yield "evaluation", STEPS, evaluation_row("after", 0.75)


def weights_of_step(step: int) -> dict:
    return {**weights(step), "age": ages(step)}
