"""Published speeds. docs/planning.md lists the sources; what is estimated is said here too."""

from megatron_vespo.config.planning import DecodePoint, RatesConfig

QWEN3_30B_A3B_ON_H100 = RatesConfig(
    about=(
        "Qwen3-30B-A3B in bf16 on H100 80 GB. Engine of 2 GPUs (expert parallel 2): ML.ENERGY Leaderboard, 2026-02-27. "
        "Trainer: Megatron-Bridge performance summary, 25.11, 16 GPUs. Weight update: slime, 8 GPUs. Prefill and cache "
        "size: estimates"
    ),
    engine_gpus=2,
    decode=(
        DecodePoint(running=8, tokens_per_second=831),
        DecodePoint(running=16, tokens_per_second=1253),
        DecodePoint(running=32, tokens_per_second=2026),
        DecodePoint(running=64, tokens_per_second=3290),
        DecodePoint(running=128, tokens_per_second=4546),
        DecodePoint(running=256, tokens_per_second=7154),
        DecodePoint(running=512, tokens_per_second=9366),
        DecodePoint(running=1024, tokens_per_second=12640),
    ),
    # 90% of 2 x 80 GB less 61 GB of weights, over 48 layers x 2 x 4 heads x 128 x 2 bytes a token.
    cache_tokens=844_000,
    # 3.3 G active parameters x 2 FLOP a token at 30% of 2 x 989 TFLOP/s.
    prefill_tokens_per_second=90_000,
    train_tokens_per_second_per_gpu=5275,
    sync_seconds=7.0,
)
