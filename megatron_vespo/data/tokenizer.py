"""The tokenizer of a Hugging Face folder: text to prompt tokens once, sampled tokens to text for graders."""

import json
import logging
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_vespo.config import ConfigError
from megatron_vespo.data.sources import Question

logger = logging.getLogger(__name__)


class ChatTokenizer:
    """Renders questions through the chat template and reads responses.

    Text becomes tokens only here, once per prompt; what an engine sampled is never encoded again. A tokenizer without
    a chat template gets the plain text (a system prompt before it, with an empty line between), as base models do.

    Attributes:
        stop_token_ids: tokens that end a response: `eos_token_id` of generation_config.json and the tokenizer's own.
        end_token_id: the one that ends a demonstration: the tokenizer's own, or else the first of those.
    """

    def __init__(self, backend: PreTrainedTokenizerBase, stop_token_ids: tuple[int, ...], end_token_id: int):
        self.backend = backend
        self.stop_token_ids = stop_token_ids
        self.end_token_id = end_token_id
        self._ids = frozenset(backend.get_vocab().values())

    @property
    def has_chat_template(self) -> bool:
        return bool(self.backend.chat_template)

    @property
    def largest_id(self) -> int:
        return max(self._ids)

    def prompt_ids(self, question: Question, system_prompt: str | None = None) -> NDArray[np.int32]:
        """[prompt tokens] int32: everything up to where the response begins.

        Raises:
            ConfigError: chat messages without a chat template, or messages that the template refuses.
        """
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        if self.has_chat_template:
            system = [{"role": "system", "content": system_prompt}] if system_prompt else []
            try:
                ids = self.backend.apply_chat_template(
                    [*system, *messages], add_generation_prompt=True, tokenize=True, return_dict=False
                )
            except Exception as error:  # jinja's own errors and whatever a template raises
                raise ConfigError(f"the chat template refuses {messages!r}: {error}") from error
            return np.asarray(ids, dtype=np.int32)
        if not isinstance(question, str):
            raise ConfigError(
                "a prompt is a list of chat messages, but the tokenizer has no chat template; "
                "give prompts as text or add chat_template.jinja to the model's folder"
            )
        text = f"{system_prompt}\n\n{question}" if system_prompt else question
        return np.asarray(self.backend.encode(text), dtype=np.int32)

    def response_ids(self, response: str) -> NDArray[np.int32]:
        """[response tokens] int32 of a demonstration, its end token included."""
        ids = self.backend.encode(response, add_special_tokens=False)
        return np.asarray([*ids, self.end_token_id], dtype=np.int32)

    def observation_ids(self, text: str) -> NDArray[np.int32]:
        """[tokens] int32 of what an environment says, which comes behind a response's own tokens as it is."""
        return np.asarray(self.backend.encode(text, add_special_tokens=False), dtype=np.int32)

    def decode_response(self, response_ids: NDArray[np.int32] | list[int]) -> str:
        """The text that graders and reports see: cut before the stop token at the end, all other tokens kept.

        Special tokens stay: some tokenizers hold `<answer>` or `<tool_call>` as one. Ids that the tokenizer lacks
        (see `ids_beyond`) have no text.
        """
        ids = [int(i) for i in response_ids]
        if ids and ids[-1] in self.stop_token_ids:
            ids.pop()
        known = [i for i in ids if i in self._ids]
        text = self.backend.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)

    def ids_beyond(self, response_ids: NDArray[np.int32] | list[int]) -> int:
        """How many of these ids the tokenizer lacks (a model's vocabulary may be larger, and can sample them)."""
        return sum(int(i) not in self._ids for i in response_ids)

    def check_vocabulary(self, model_vocabulary: int, origin: str) -> None:
        """Refuse a tokenizer that has ids without an embedding. A larger model vocabulary is fine.

        Raises:
            ConfigError: `origin` (a folder) is named.
        """
        if self.largest_id >= model_vocabulary:
            raise ConfigError(
                f"{origin}: the tokenizer has id {self.largest_id} but config.json says vocab_size {model_vocabulary}, "
                "so that token has no embedding. Use the tokenizer that belongs to this model, or enlarge its embedding"
            )


def load_tokenizer(folder: str | Path) -> ChatTokenizer:
    """Read tokenizer, chat template, stop tokens of a Hugging Face folder, and check them against its config.json.

    Raises:
        ConfigError: the folder or its tokenizer is missing or unreadable, there is no stop token, or the tokenizer
            has an id beyond the model's vocabulary.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder (model.path is a local folder in Hugging Face format)")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ConfigError(f"{folder}: has no tokenizer (tokenizer.json and tokenizer_config.json)")
    try:
        backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or the Rust library's own Exception
        raise ConfigError(f"{folder}: the tokenizer cannot be read: {error}") from error
    stops = _stop_token_ids(folder, backend)
    own = backend.eos_token_id
    tokenizer = ChatTokenizer(backend, stops, own if isinstance(own, int) else stops[0])
    vocabulary = _json(folder / "config.json").get("vocab_size")
    if isinstance(vocabulary, int):
        tokenizer.check_vocabulary(vocabulary, str(folder))
    if not tokenizer.has_chat_template:
        logger.warning("%s: no chat template; prompts are given to the model as plain text", folder)
    return tokenizer


def _stop_token_ids(folder: Path, backend: PreTrainedTokenizerBase) -> tuple[int, ...]:
    configured = _json(folder / "generation_config.json").get("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    ids = [i for i in [*ids, backend.eos_token_id] if isinstance(i, int)]
    if not ids:
        raise ConfigError(
            f"{folder}: no token ends a response; set eos_token in tokenizer_config.json "
            "or eos_token_id in generation_config.json"
        )
    return tuple(dict.fromkeys(ids))


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected an object at the top, found {type(content).__name__}")
    return content
