"""What in a run deserves attention, said in words. Thresholds are those of docs/metrics.md."""

from collections import Counter

from megatron_vespo.observability.charts import percent
from megatron_vespo.observability.run_folder import (
    MISMATCH_KINDS,
    PROBE_KINDS,
    RunFolder,
    at_equal_weights,
    column,
    mean,
)
from megatron_vespo.routing.routes import least_agreement

OUTCOMES = ("exception", "timeout", "crash", "not_finite")
MOST_MISSING_ROUTES = 0.05
LEAST_K3 = 1e-9
"""Below it a mismatch is float32's rounding, which no replay repairs."""


def findings(run: RunFolder) -> list[str]:
    """One sentence for each thing that is not as it should be; empty for a healthy run."""
    return [*_numerics(run), *_staleness(run), *_routing(run), *_rewards(run), *_responses(run)]


def _numerics(run: RunFolder) -> list[str]:
    found = []
    mismatches = max((value or 0 for value in column(run.kind("sync"), "mismatches")), default=0)
    if mismatches:
        found.append(
            f"{mismatches:.0f} tensors on the engine differed from the trainer's after a sync: do not trust this run."
        )
    bad = [
        row["step"]
        for row in run.kind("step")
        if row.get("loss") != row.get("loss") or row.get("grad_norm") == float("inf")
    ]
    if bad:
        found.append(f"The loss or the gradient was not finite at {len(bad)} steps, first at step {bad[0]}.")
    alarms = [row for row in run.kind(*MISMATCH_KINDS) if row.get("alarm/mismatch")]
    if alarms:
        # Where a run is older than this figure, it is that of W, but for `old_policy: proximal`.
        widest = max(row.get("mismatch/log_weight_std", row.get("log_weight/std")) or 0.0 for row in alarms)
        extent = f"reached {widest:.2f} (alarm: 0.5)" if widest > 0.5 else "was above 0.5"
        found.append(
            f"The standard deviation of log W at equal weights {extent}: engine and trainer disagree, "
            "and the kernel spends itself on numeric error."
        )
    return found


def _staleness(run: RunFolder) -> list[str]:
    steps = run.kind("step")
    found = []
    dead = [value for value in column(steps[-len(steps) // 4 :], "phi/share_below_0.01") if value is not None]
    if dead and sum(dead) / len(dead) > 0.2:
        found.append(
            f"{sum(dead) / len(dead):.0%} of trajectories had a coefficient below 0.01 in the last quarter of the run: data too "
            "stale, or the learning rate too high."
        )
    return found


def _routing(run: RunFolder) -> list[str]:
    rollouts = run.kind("rollout")
    found = []
    missing = mean(column(rollouts, "routing/missing_share"))
    if missing is not None and missing > MOST_MISSING_ROUTES:
        reasons = masked_positions(run).most_common(1)
        mostly = f", most of them masked as '{reasons[0][0]}'" if reasons else ""
        found.append(f"{percent(missing)} of positions had no recorded route{mostly}: they were routed natively.")
    at_equal = column(at_equal_weights(run.kind("step")), "routing/same_set")
    at_equal += column(run.kind("mismatch"), "routing_probe/same_set")
    there = [value for value in at_equal if value is not None]
    if there and min(there) < (least := _least_agreement(run)):
        found.append(
            f"At equal weights only {percent(min(there))} of recorded positions had the experts that the trainer chooses "
            f"(expected: {percent(least)}): engine and trainer don't compute the same router."
        )
    probed = run.kind(*PROBE_KINDS)
    native, replayed = (mean(column(probed, f"routing_probe/{name}/k3")) for name in ("native", "replayed"))
    agreed = mean(column(probed, "routing_probe/same_set"))
    # Where all experts agree, or none is recorded, there is nothing that replay could lower.
    repairable = agreed is not None and agreed < 1
    if repairable and native is not None and replayed is not None and replayed >= native > LEAST_K3:
        found.append(
            f"With the engine's routes k3 between engine and trainer was {replayed:.1e}, without them {native:.1e}: "
            "replay did not lower the mismatch."
        )
    return found


def masked_positions(run: RunFolder) -> Counter[str]:
    """Positions without a route by the reason, over all rollout batches."""
    prefix = "routing/masked/"
    counts: Counter[str] = Counter()
    for row in run.kind("rollout"):
        counts.update({key.removeprefix(prefix): int(row[key] or 0) for key in row if key.startswith(prefix)})
    return counts


def _least_agreement(run: RunFolder) -> float:
    trainer = run.setting("model.dtype")
    noisy = run.setting("rollout.engine.router_noise") is not None
    return least_agreement(trainer, run.setting("rollout.engine.dtype") or trainer, noisy)


def _rewards(run: RunFolder) -> list[str]:
    rollouts = run.kind("rollout")
    found = []
    for name in OUTCOMES:
        count = sum(value or 0 for value in column(rollouts, f"reward/outcome/{name}"))
        if count:
            graded = sum(value or 0 for value in column(rollouts, "reward/outcome/graded"))
            found.append(
                f"Grading ended in '{name}' {count:.0f} times (graded: {graded:,.0f}); each got the fallback reward."
            )
    last = column(rollouts, "reward/groups_without_variance")[-1:]
    if last and last[0] is not None and last[0] > 0.9:
        found.append(
            f"At the end {last[0]:.0%} of groups had one reward throughout: there was little left to learn from."
        )
    return found


def _responses(run: RunFolder) -> list[str]:
    rollouts = run.kind("rollout")
    found = []
    cut = column(rollouts, "response/truncated_share")[-1:]
    if cut and cut[0] is not None and cut[0] > 0.1:
        found.append(f"At the end {cut[0]:.0%} of responses were cut at the length limit.")
    beyond = sum(value or 0 for value in column(rollouts, "response/ids_beyond_tokenizer"))
    if beyond:
        found.append(f"{beyond:.0f} sampled token ids were not the tokenizer's.")
    return found
