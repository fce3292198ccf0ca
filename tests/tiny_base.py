"""A tiny random Qwen3-MoE with a tokenizer: enough for whole runs that need not learn."""

from pathlib import Path

from tiny_engine import write_tiny_qwen3_moe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tiny_base(folder: Path) -> None:
    """A token for each byte; ids 0 to 3 are control tokens, and the model's vocabulary is larger than this."""
    write_tiny_qwen3_moe(folder, seed=0)
    control = ["<pad>", "<bos>", "<eos>", "<assistant>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*control, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<assistant>"
    wrapped.save_pretrained(folder)
