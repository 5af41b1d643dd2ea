"""The golden folders in huggingface/; see make_huggingface_goldens.py."""

import pathlib

GOLDENS = pathlib.Path(__file__).parent / "huggingface"
CASES = (
    "gemma2",
    "gemma2_bidirectional",
    "gemma3_text",
    "gemma3_bidirectional",
    "gemma3_vision",
    "t5gemma",
)
