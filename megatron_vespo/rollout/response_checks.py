"""Is a response what was asked for? What is not must not be trained on or graded."""

import numpy as np

from megatron_vespo.errors import RunError
from megatron_vespo.rollout.engine_output import EngineOutput
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.segments import covers, was_paused


class ResponseError(RunError):
    """A response that is not what was asked for, and would not be elsewhere: a setting is wrong."""


class Nonsense(ResponseError):
    """The engine returned something that cannot have been sampled as asked: it is broken."""


def check(output: EngineOutput, generation: Generation, what: str, asked: int) -> None:
    """Raises ResponseError, of the kind Nonsense where the engine is broken, for what must not be trained on or graded.

    Args:
        asked: tokens that it was allowed to have; those that earlier requests sampled of the same response are not
            among them.
    """
    length = len(output.token_ids)
    paused = generation.weight_version is None and was_paused(output)
    if output.finish_reason not in ("stop", "length") and not paused:
        raise Nonsense(f"{what}: the engine ended it: {output.finish_reason} {output.finish_detail}")
    if not (0 if paused else 1) <= length <= asked:
        raise Nonsense(f"{what}: {length} tokens, asked for 1 to {asked}")
    if output.finish_reason == "length" and length != asked:
        raise ResponseError(f"{what}: cut after {length} of {asked} tokens: the engine's context is too short")
    if output.finish_reason == "stop" and generation.response_length is not None:
        raise ResponseError(
            f"{what}: the engine ended it after {length} of {asked} tokens, though told to ignore stops"
        )
    if len(output.log_probs) != length:
        raise Nonsense(f"{what}: {length} tokens but {len(output.log_probs)} log-probs")
    if length:
        check_tokens(output, generation, what)
    if generation.deterministic and output.retractions:
        raise ResponseError(
            f"{what}: the engine ran out of cache and retracted it {output.retractions} times, which is outside "
            "rollout.deterministic: lower rollout.engine.max_running_requests or raise rollout.engine.max_total_tokens"
        )


def check_tokens(output: EngineOutput, generation: Generation, what: str) -> None:
    """Raises Nonsense where ids, log-probs or weight versions cannot be those of sampled tokens."""
    ids, length = output.token_ids, len(output.token_ids)
    if ids.min() < 0 or ids.max() >= generation.vocab_size:
        raise Nonsense(f"{what}: token id {ids.max()} with a vocabulary of {generation.vocab_size}")
    if not np.isfinite(output.log_probs).all() or output.log_probs.max() > 1e-3:
        raise Nonsense(f"{what}: a log-prob is not finite or above 0")
    if not covers(output.weight_spans, length):
        raise Nonsense(f"{what}: its weight versions {output.weight_spans} do not cover its {length} tokens")
    versions = {span.version for span in output.weight_spans}
    expected = generation.weight_version
    if expected is None and not all(version.isdecimal() for version in versions):
        raise Nonsense(f"{what}: sampled under weights {versions}, which are not optimizer steps")
    if expected is not None and versions != {str(expected)}:
        raise Nonsense(f"{what}: sampled under weights {versions}, expected {expected}")


def check_versions(output: EngineOutput, before: int | None, after: int | None, what: str) -> None:
    """Raises Nonsense where tokens were sampled under other weights than the engine was given.

    Args:
        before, after: weight version of the engine when the request was made and when it was answered; None: not known.
    """
    if before is None or after is None:
        return
    for span in output.weight_spans:
        if not before <= int(span.version) <= after:
            raise Nonsense(f"{what}: sampled under weights {span.version}, the engine was given {before} to {after}")
