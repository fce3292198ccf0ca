"""Standard input: sequences of token ids as JSON. Prints the trainer's log-probs of each token after the first."""

import json
import sys

import numpy as np

from megatron_vespo.architecture.hf_config import read_architecture
from megatron_vespo.checkpoint.load import load_hf_weights
from megatron_vespo.config import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_vespo.packing.batch import TrainingSequence, pack
from megatron_vespo.policy.policy import MegatronPolicy
from megatron_vespo.rendezvous import listen

folder = sys.argv[1]
architecture = read_architecture(folder)
policy = MegatronPolicy(
    architecture,
    ModelConfig(path=folder, dtype="float32"),
    PolicyConfig(),
    OptimizerConfig(),
    total_steps=1,
    seed=0,
    rank=0,
    world_size=1,
    master=listen("127.0.0.1"),
    temperature=1.0,
)
load_hf_weights(policy.model, architecture, folder)
sequences = [
    TrainingSequence(np.array(t), np.ones(len(t) - 1, bool), np.zeros(len(t) - 1, np.float32), 1.0, key)
    for key, t in enumerate(json.load(sys.stdin))
]
scores = policy.score([pack(sequences)])
print(json.dumps([scores[key].log_probs.tolist() for key in range(len(sequences))]))
