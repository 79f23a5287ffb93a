"""What libraries print that a user cannot act on is kept off the screen; errors never are.

A command calls :func:`quiet_libraries` before it imports them, for its process is its own. What is
also called from notebooks and other programs uses :func:`quietly`, which puts everything back.
Neither hides a warning of unknown origin.
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
    """DeepSpeed says on stdout which accelerator it takes, when it is imported: too early for
    :func:`quietly`. The package drops this one line, whoever imports it."""
    logging.getLogger("DeepSpeed").addFilter(_is_no_accelerator_notice)


def quiet_libraries() -> None:
    """From now on, and in child processes. TRANSFORMERS_VERBOSITY and HF_HUB_DISABLE_PROGRESS_BARS
    stand as the user has set them."""
    os.environ.setdefault(_VERBOSITY, "error")  # transformers and the hub's client read them
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # when they are imported
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # vlmds.models.fetch reports a broken download
    if "transformers" in sys.modules and os.environ[_VERBOSITY] == "error":
        _quiet_transformers()
    _ignore_warnings()


@contextmanager
def quietly() -> Iterator[None]:
    """The same as long as the block runs, for libraries that are imported already."""
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
    """What libraries tell each other's authors: names that go, calls that change."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    # peft 0.21 asks transformers 5 for an attribute under its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # Training says it itself, once, with the key (vlmds.training.main.warn_of_readers).
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")


def _is_no_accelerator_notice(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or record.filename != "real_accelerator.py"
