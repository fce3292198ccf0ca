"""An environment: whoever answers wrongly is asked once more. `environment: examples.second_try:ask_again`.

What it says is context: the model is trained on its own turns alone. It stands behind the model's own tokens as it is, so a
turn of a chat needs the markup that the model's chat template would give it.
"""

from reasoning_gym.utils import extract_answer


def ask_again(response: str, answer: str, row: dict) -> str | None:
    """
    Args:
        response: all turns so far, with what was said between them.
        row: the entry of reasoning-gym.

    Returns:
        The question as another turn; None where the last turn was right.
    """
    if extract_answer(response) == answer:
        return None
    return f"<user>Wrong. {row['question']}<eos><assistant>"
