"""Suppression of library messages that a user cannot act on. Errors are never suppressed.

A command, which has a process of its own, calls :func:`quiet_libraries` before it imports them. Code that
is also called from notebooks and other programs uses :func:`quietly`, which restores all settings.
Warnings of unknown origin stay visible.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = (
    r"(torch|transformers|peft|deepspeed|accelerate|bitsandbytes|huggingface_hub|"
    r"webdataset)(\.|$)"
)
_VERBOSITY = "TRANSFORMERS_VERBOSITY"


def drop_accelerator_notice() -> None:
    """Drop the line in which DeepSpeed prints its accelerator on stdout. It comes when DeepSpeed is imported,
    too early for :func:`quietly`, so the package always drops it."""
    logging.getLogger("DeepSpeed").addFilter(_is_no_accelerator_notice)


def quiet_libraries() -> None:
    """Suppress messages from now on, also in child processes. Values of TRANSFORMERS_VERBOSITY and
    HF_HUB_DISABLE_PROGRESS_BARS that the user has set are kept."""
    os.environ.setdefault(_VERBOSITY, "error")  # read when transformers and the hub's
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # client are imported
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # vlmds.models.fetch reports a broken download
    if "transformers" in sys.modules and os.environ[_VERBOSITY] == "error":
        _quiet_transformers()
    _ignore_warnings()


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress messages within the block, of libraries that are already imported."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        _ignore_warnings()
        _quiet_transformers()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


def _quiet_transformers() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _ignore_warnings() -> None:
    """Ignore warnings meant for developers: deprecations of names and calls."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    # peft 0.21 asks transformers 5 for an attribute under its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # Training prints this itself, once, with the key (vlmds.training.main.warn_of_readers).
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")


def _is_no_accelerator_notice(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.filename != "real_accelerator.py"
