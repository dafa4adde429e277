"""ochat: C-RLFT fine-tuning of chat models on mixed-quality data.

Importing this package has no effect and loads nothing heavy; the public names below are resolved on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "load_config": "ochat.config",
    "prepare": "ochat.data.prepare",
    "train": "ochat.training.trainer",
    "load_chat": "ochat.serving.chat",
}
__all__ = ["__version__", "load_chat", "load_config", "prepare", "train"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ochat' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
