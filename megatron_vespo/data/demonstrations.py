"""Demonstrations for supervised training: a .jsonl file to training sequences."""

from pathlib import Path

import numpy as np

from megatron_vespo.config import ConfigError, DemonstrationsConfig
from megatron_vespo.data.file_source import check_row, read_rows
from megatron_vespo.data.tokenizer import ChatTokenizer
from megatron_vespo.packing.batch import TrainingSequence


def load_demonstrations(config: DemonstrationsConfig, tokenizer: ChatTokenizer) -> list[TrainingSequence]:
    """Each row {"prompt": text or chat messages, "response": text} as a sequence, in the file's order.

    The prompt goes through the chat template as in RL; the loss counts the response's tokens and the end token
    (`ChatTokenizer.end_token_id`). `key` is the row's number from 0; a batch gives its own keys.

    Raises:
        ConfigError: the file or a row is bad, or longer than `max_tokens`; the row is named, from 1.
    """
    path = Path(config.path)
    sequences = []
    for number, row in enumerate(read_rows(path, "demonstrations.path"), start=1):
        check_row(row, number, path, "prompt", "response")
        if not isinstance(row["response"], str):
            raise ConfigError(f"{path}: row {number}: 'response' is not text but {type(row['response']).__name__}")
        prompt, response = tokenizer.prompt_ids(row["prompt"]), tokenizer.response_ids(row["response"])
        tokens = np.concatenate([prompt, response])
        if len(tokens) > config.max_tokens:
            raise ConfigError(
                f"{path}: row {number} has {len(tokens)} tokens, more than demonstrations.max_tokens ({config.max_tokens})"
            )
        labels = np.arange(1, len(tokens)) >= len(prompt)
        zeros = np.zeros(len(labels), dtype=np.float32)
        sequences.append(TrainingSequence(tokens, labels, zeros, advantage=1.0, key=number - 1))
    return sequences
