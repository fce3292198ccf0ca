"""Routing replay: bytes of each hop, and how fast routes are decoded, sliced for the trainer's ranks and handed to them.

    OMP_NUM_THREADS=1 python benchmarks/routing.py --json results/routing.json

At Qwen3-30B-A3B's shape, on about two million tokens in responses of 300 to 8,192. Decoding starts from the bodies of
HTTP answers and is counted in base64 bytes; slicing and what follows in stored (uint8) bytes, over all ranks of
PP2 x CP2 x TP2 together. Times are of a process's CPU, page faults included, since the machine may be shared. Slices are
handed out through Ray's object store, one rank after the other: the sender's time is that of putting them in, the
receivers', who are other processes and work side by side, that of getting them out and touching every page. One round
that is not counted comes first, since the store takes its memory from the system only once.
"""

import argparse
import base64
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import msgspec
import numpy as np
import orjson
import pybase64
import ray

from megatron_vespo.packing.batch import MicroBatch, TrainingSequence
from megatron_vespo.packing.steps import PackingRules, pack_step
from megatron_vespo.routing.codec import decode
from megatron_vespo.routing.routes import Routes, recorded_routes
from megatron_vespo.routing.slices import RankPlace, RoutingShape, assemble_routes, slice_routes

LAYERS, TOPK, EXPERTS = 48, 8, 128
SHAPE = RoutingShape((True,) * LAYERS, TOPK, EXPERTS)
WIRE_ROW = LAYERS * TOPK * 4 // 3 * 4
"""Base64 bytes of a token: four for three bytes, of which an id has four."""
TOKENS, SHORTEST, LONGEST = 2_000_000, 300, 8192
AT_ONCE = 16
"""Responses that are in memory at once, while decoding is measured."""
BLOCK = 96
"""Rows that are taken at once where a part of decoding is measured alone."""
TOKEN_BUDGET = 32_768


def response_lengths() -> list[int]:
    random = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < TOKENS:
        lengths.append(int(random.integers(SHORTEST, LONGEST + 1)))
    return lengths


def pool_of_ids() -> np.ndarray:
    """[2 * LONGEST, LAYERS, TOPK] int32; responses are cut out of it."""
    random = np.random.default_rng(1)
    few = random.random((2048 * LAYERS, EXPERTS), dtype=np.float32).argpartition(TOPK, axis=1)[:, :TOPK]
    few = few.reshape(2048, LAYERS, TOPK).astype("<i4")
    return few[random.integers(0, len(few), 2 * LONGEST)]


def body_of(ids: np.ndarray) -> bytes:
    """Of a server's answer; what else is in it is small beside the routes."""
    answer = {"output_ids": [1, 2, 3], "meta_info": {"weight_version": "3", "routed_experts": ""}}
    answer["meta_info"]["routed_experts"] = pybase64.b64encode(ids.tobytes()).decode()
    return orjson.dumps(answer)


def payload_of(answer: dict) -> str:
    return answer["meta_info"]["routed_experts"]


def full(payload: str) -> np.ndarray:
    rows = len(payload) // WIRE_ROW
    return decode(payload, rows=rows, moe_layers=(True,) * LAYERS, topk=TOPK, num_experts=EXPERTS)


def base64_alone(payload: str) -> None:
    for start in range(0, len(payload), BLOCK * WIRE_ROW):
        pybase64.b64decode(payload[start : start + BLOCK * WIRE_ROW], validate=True)


def unchecked(payload: str) -> np.ndarray:
    """Base64 and compaction."""
    experts = np.empty(len(payload) // WIRE_ROW * LAYERS * TOPK, dtype=np.uint8)
    for number, start in enumerate(range(0, len(payload), BLOCK * WIRE_ROW)):
        ids = np.frombuffer(pybase64.b64decode(payload[start : start + BLOCK * WIRE_ROW], validate=True), "<i4")
        experts[number * BLOCK * LAYERS * TOPK :][: len(ids)] = ids
    return experts


def standard_library(body: bytes) -> np.ndarray:
    """Nothing is checked."""
    return np.frombuffer(base64.b64decode(payload_of(json.loads(body))), "<i4").astype(np.uint8)


FROM_THE_BODY: dict[str, Callable[[bytes], object]] = {
    "JSON by orjson": orjson.loads,
    "JSON by msgspec": msgspec.json.decode,
    "all with orjson": lambda body: full(payload_of(orjson.loads(body))),
    "all with msgspec": lambda body: full(payload_of(msgspec.json.decode(body))),
    "standard library, unchecked": standard_library,
}
FROM_THE_PAYLOAD: dict[str, Callable[[str], object]] = {
    "base64": base64_alone,
    "base64 and compaction": unchecked,
    "base64, compaction and validation": full,
}


def cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure_decoding(lengths: list[int], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way, over all responses, in each repetition."""
    pool = pool_of_ids()
    taken = {name: [0.0] * repetitions for name in (*FROM_THE_BODY, *FROM_THE_PAYLOAD)}
    for first in range(0, len(lengths), AT_ONCE):
        for number, length in enumerate(lengths[first : first + AT_ONCE]):
            start = (first + number) * 1009 % (len(pool) - length)
            body = body_of(pool[start : start + length])
            payload = payload_of(orjson.loads(body))
            if not np.array_equal(full(payload), pool[start : start + length]):
                raise SystemExit("decoded routes are not those sent")
            for repetition in range(repetitions):
                for name, way in FROM_THE_BODY.items():
                    taken[name][repetition] += cpu_seconds(lambda way=way, body=body: way(body))
                for name, way in FROM_THE_PAYLOAD.items():
                    taken[name][repetition] += cpu_seconds(lambda way=way, payload=payload: way(payload))
    return taken


def places() -> list[RankPlace]:
    half = LAYERS // 2
    stages = (tuple(range(half)), tuple(range(half, LAYERS)))
    return [
        RankPlace(0, stage, context, 2, sequence, 2) for stage, context, sequence in product(stages, range(2), range(2))
    ]


def step_of(lengths: list[int]) -> tuple[list[MicroBatch], dict[int, Routes]]:
    random = np.random.default_rng(2)
    sequences = [
        TrainingSequence(
            token_ids=np.zeros(length + 1, dtype=np.int32),
            label_mask=np.ones(length, dtype=np.bool_),
            old_log_probs=np.zeros(length, dtype=np.float32),
            advantage=1.0,
            key=key,
        )
        for key, length in enumerate(lengths)
    ]
    rules = PackingRules(ranks=1, token_budget=TOKEN_BUDGET, segment_multiple=4, total_multiple=4)
    routes = {
        key: recorded_routes(random.integers(0, EXPERTS, (length, LAYERS, TOPK), dtype=np.uint8), 0)
        for key, length in enumerate(lengths)
    }
    return pack_step(sequences, rules)[0], routes


@ray.remote(num_cpus=1)
class Receiver:
    def receive(self, slices: list[ray.ObjectRef]) -> float:
        """CPU seconds of getting them (one reference in a list, so that Ray does not do it before) and touching pages."""

        def get() -> int:
            return sum(int(part.experts.reshape(-1)[::4096].sum()) for part in ray.get(slices[0]))

        return cpu_seconds(get)


def slice_and_hand_out(
    micro_batches: list[MicroBatch], routes: dict[int, Routes], receiver: ray.actor.ActorHandle
) -> dict[str, float]:
    """Seconds of each part, over all ranks."""
    taken = {"slicing": 0.0, "handing out, sender": 0.0, "handing out, all receivers": 0.0}
    for place in places():
        started = time.process_time()
        slices = slice_routes(micro_batches, routes, place, SHAPE)
        sliced = time.process_time()
        reference = ray.put(slices)
        taken["slicing"] += sliced - started
        taken["handing out, sender"] += time.process_time() - sliced
        taken["handing out, all receivers"] += ray.get(receiver.receive.remote([reference]))
    return taken | {"slicing and handing out, sender": taken["slicing"] + taken["handing out, sender"]}


def put_together(micro_batches: list[MicroBatch], routes: dict[int, Routes]) -> tuple[float, dict[str, list[int]]]:
    """Seconds, and the bytes that each rank received or, with R2, sends."""
    held = [(place, slice_routes(micro_batches, routes, place, SHAPE)) for place in places()]
    started = time.process_time()
    whole = assemble_routes([micro_batches], held, SHAPE, 0)
    seconds = time.process_time() - started
    if any(not np.array_equal(whole[key].experts, routes[key].experts) for key in routes):
        raise SystemExit("routes that were put together again are not those that were sliced")
    return seconds, {
        "experts": [sum(part.experts.nbytes for part in parts) for _, parts in held],
        "recorded": [sum(part.recorded.nbytes for part in parts) for _, parts in held],
    }


def measure_slicing(lengths: list[int], repetitions: int) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Seconds of each part, over all ranks, in each repetition; and bytes that ranks receive."""
    micro_batches, routes = step_of(lengths)
    receiver = Receiver.remote()
    slice_and_hand_out(micro_batches, routes, receiver)
    rounds = [slice_and_hand_out(micro_batches, routes, receiver) for _ in range(repetitions)]
    taken = {name: [one[name] for one in rounds] for name in rounds[0]}
    again = [put_together(micro_batches, routes) for _ in range(repetitions)]
    return taken | {"putting together again (R2)": [seconds for seconds, _ in again]}, again[0][1]


def bytes_of_each_hop(sent: dict[str, list[int]], tokens: int) -> dict[str, float]:
    """Padding and fillers are among what is sent."""
    stored = tokens * SHAPE.bytes_per_token
    return {
        "wire, base64": WIRE_ROW,
        "wire, decoded": WIRE_ROW // 4 * 3,
        "stored": SHAPE.bytes_per_token,
        "moved to all ranks together": round(sum(sent["experts"]) / tokens, 3),
        "marks of what is recorded, to all ranks together": round(sum(sent["recorded"]) / tokens, 3),
        "largest share that one rank receives": round(max(sent["experts"]) / stored, 6),
        "the same with its marks": round(
            max(map(sum, zip(sent["experts"], sent["recorded"], strict=True))) / stored, 6
        ),
    }


def speed(taken: list[float], num_bytes: int) -> dict[str, float]:
    """GB/s."""
    found = sorted(num_bytes / seconds / 1e9 for seconds in taken)
    return {
        "median": round(statistics.median(found), 3),
        "least": round(found[0], 3),
        "most": round(found[-1], 3),
    }


def show(results: dict) -> None:
    print(f"{results['tokens']} tokens in {results['responses']} responses, {results['repetitions']} repetitions")
    print("\nbytes per token")
    for name, value in results["bytes_per_token"].items():
        print(f"  {name:50} {value:10}")
    for title, unit in (("decoding", "base64"), ("slicing", "uint8")):
        print(f"\n{title}, GB/s of {unit} bytes: median (least to most)")
        for name, found in results[f"{title}_gb_per_s"].items():
            print(f"  {name:50} {found['median']:6.2f} ({found['least']:.2f} to {found['most']:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    lengths = response_lengths()
    tokens = sum(lengths)
    decoding = measure_decoding(lengths, options.repetitions)
    ray.init(num_cpus=1, object_store_memory=2**29, include_dashboard=False, log_to_driver=False)
    slicing, sent = measure_slicing(lengths, options.repetitions)
    ray.shutdown()
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load_before": load_before,
        "repetitions": options.repetitions,
        "responses": len(lengths),
        "tokens": tokens,
        "bytes_per_token": bytes_of_each_hop(sent, tokens),
        "decoding_gb_per_s": {name: speed(taken, tokens * WIRE_ROW) for name, taken in decoding.items()},
        "slicing_gb_per_s": {name: speed(taken, tokens * SHAPE.bytes_per_token) for name, taken in slicing.items()},
    }
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
