"""Folders with their own code: `--format hf-llava` of a resampler, or of pooled features.

LLaVA's architecture has neither. The folder therefore contains its modelling code, which
transformers runs where the caller passes ``trust_remote_code=True``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vlmds.experiments.schema import Experiment
from vlmds.export import bundle
from vlmds.export.bundle.configuration_vlmds import VlmdsConfig
from vlmds.export.bundle.processing_vlmds import VlmdsProcessor
from vlmds.export.processor import check_sequence, exported_tokenizer, image_processor
from vlmds.export.weights import named, nameless, write_model
from vlmds.models import projectors
from vlmds.models.assemble import Model
from vlmds.models.sequences import SequenceBuilder

CODE = ("configuration_vlmds", "modeling_vlmds", "processing_vlmds")
# Lines of projectors.py that refer to vlmds, and what stands for them in the copy.
REPLACED = {
    "from vlmds.experiments.schema import ProjectorConfig\n": "",
    "from vlmds.errors import InputError\n": "",
    "raise InputError(": "raise ValueError(",
}


def write_remote(folder: Path, model: Model, experiment: Experiment, builder: SequenceBuilder) -> None:
    """Write model (adapter folded in), processor and their code into ``folder``.

    Raises:
        InputError: see :mod:`vlmds.export.processor`.
    """
    tower, llm, projector = model.tower, model.captioner.llm, model.captioner.projector
    assert tower is not None  # None only where features are stored
    tokenizer, token = exported_tokenizer(model.tokenizer, llm, experiment.llm.model)
    config = VlmdsConfig(
        vision_config=nameless(tower.clip.config),
        text_config=nameless(llm.config),
        projector=experiment.projector.model_dump(exclude={"init"}),
        num_frames=projector.num_frames,
        feature_layer=tower.feature_layer,
        pool=tower.pool,
        image_token_id=tokenizer.get_vocab()[token],
        dtype=llm.dtype,
        architectures=["VlmdsForConditionalGeneration"],
    )
    config.auto_map = {
        "AutoConfig": "configuration_vlmds.VlmdsConfig",
        **dict.fromkeys(("AutoModel", "AutoModelForImageTextToText"), "modeling_vlmds.VlmdsForConditionalGeneration"),
    }
    weights = named("vision_tower", tower.clip) | named("projector", projector) | named("language_model", llm)
    write_model(folder, config, weights, builder)
    VlmdsProcessor.register_for_auto_class()  # which makes save_pretrained name its code
    processor = VlmdsProcessor(
        image_processor(tower, experiment.data.fit),
        tokenizer,
        num_frames=projector.num_frames,
        num_visual_tokens=projector.num_tokens,
        num_picture_tokens=projector.tokens_of(projector.patches),
        image_token=token,
        chat_template=tokenizer.chat_template,
    )
    check_sequence(processor, builder, projector, tower.image_size)
    processor.save_pretrained(folder)
    for name in CODE:
        shutil.copyfile(Path(bundle.__file__).with_name(f"{name}.py"), folder / f"{name}.py")
    (folder / "projectors_vlmds.py").write_text(standalone_projectors(), encoding="utf-8")


def standalone_projectors() -> str:
    """The source of :mod:`vlmds.models.projectors` without its imports of vlmds."""
    source = Path(projectors.__file__).read_text(encoding="utf-8")
    for old, new in REPLACED.items():
        if old not in source:
            raise RuntimeError(f"{projectors.__file__} has changed: no {old!r}")
        source = source.replace(old, new)
    return source
