"""Imports that forked ranks need not make themselves; see forked.py. Nothing here starts a thread,
which a fork would not have, or makes an engine or a model."""

import gc

import deepspeed.runtime.engine  # noqa: F401
import peft.tuners.lora.bnb  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401
import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import tests.training.launch  # noqa: F401
import vlmds.evaluation.evaluate  # noqa: F401
import vlmds.training.main  # noqa: F401

get_checkpoint_conversion_mapping("qwen3")  # builds a thousand regular expressions, a second's work
gc.collect()
gc.freeze()  # or each rank's collector would go through, and copy, all that is here
