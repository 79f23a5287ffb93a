"""Export of a run or artifact into a folder of one of five forms.

    vlmds             the artifact itself: experiment.yaml, artifact.json, projector, adapter/
    vlmds --merge     the same, but with llm/ (the language model with the adapter folded in)
                      instead of adapter/
    projector         an artifact of the projector alone, for ``projector.init``
    peft              the adapter in PEFT's format, and the projector
    hf-llava          a LLaVA folder for plain transformers (:mod:`vlmds.export.llava`), or where
                      that architecture does not fit, one with its own code
                      (:mod:`vlmds.export.remote_code`)

Each has a model card. A folder with folded weights is loaded back before it gets its final name,
and its logits are compared with those of the original model.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.experiments.schema import Experiment
from vlmds.export import FORMATS
from vlmds.export.card import REMOTE, Facts, model_card
from vlmds.export.llava import fits_llava, write_llava
from vlmds.export.merge import load_unmerged, merge_adapter, unquantised
from vlmds.export.parity import Parity, captioner_logits, compare_logits, folder_logits, make_probes
from vlmds.export.remote_code import write_remote
from vlmds.files import copy_files, new_folder, sha256_of
from vlmds.inference.video_captioner import VideoCaptioner, choose_device
from vlmds.models.artifact import (
    LLM,
    PROJECTOR,
    VERSION,
    check_complete,
    copy_projector,
    is_artifact,
    read_artifact,
    stage_experiment,
)
from vlmds.models.assemble import Model
from vlmds.models.hub import is_local
from vlmds.models.language import load_tokenizer
from vlmds.models.pretrained import counted_phase
from vlmds.models.sequences import SequenceBuilder
from vlmds.permissions import check_writable
from vlmds.runs.folder import final_artifact

PEFT_CARD = ("README.md",)  # a template with nothing filled in
FRAMES = ("container", "decode", "fit", "frame_table", "probe", "sampling", "upright", "webp")
"""Modules of :mod:`vlmds.video` that choose and decode frames; example.py uses copies of them."""
HOW_TO_LOAD = Path(__file__).parent / "bundle" / "example.py"


def export_run(
    run: Path,
    output: Path,
    *,
    format: str = "vlmds",
    merge: bool = False,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> Parity | None:
    """Write ``output``, completely or not at all; returns the parity of a folder with folded weights.

    Args:
        run: run folder with all stages finished, or an artifact.
        format: one of FORMATS. merge: fold the adapter in; hf-llava always does.
        device: where weights are folded (default: the first GPU, else the CPU).
        overrides: keys of the experiment, such as ``llm.model=/models/Qwen3-8B``; the exported
            files then name these models.

    Raises:
        InputError: unfinished run, no adapter to fold or to write, ``output`` is not empty, or the
            base weights differ from the artifact's.
    """
    artifact = finished_artifact(run)
    found = read_artifact(artifact)
    meta, experiment = found.meta, stage_experiment(found, overrides)
    check_request(artifact, meta, output, format, merge)
    places = (run, artifact.parent.parent)
    run_folder = next((place for place in places if (place / "run.json").is_file()), None)
    init = experiment.projector.init
    published = experiment.model_copy(
        update={  # the team's paths are private
            "stages": [stage.model_copy(update={"data": None}) for stage in experiment.stages],
            "data": experiment.data.model_copy(update={"path": None, "blend": None, "cache_dir": None}),
            "projector": experiment.projector.model_copy(update={"init": None if init and is_local(init) else init}),
        }
    )

    def facts(kind: str, **more) -> Facts:
        return Facts(kind, meta, published, artifact, run_folder, **more)

    if format == "hf-llava" or merge:
        target = choose_device(device)
        return _write_folded(artifact, output, format, experiment, published, target, facts)
    with new_folder(output) as new:
        if format == "vlmds":
            copy_files(artifact, new, PEFT_CARD)
            if meta["adapter"]:
                _name_base(new / "adapter" / "adapter_config.json", experiment, meta)
        elif format == "projector":
            copy_projector(read_artifact(artifact), new)
        else:
            copy_files(artifact / "adapter", new, PEFT_CARD)
            _name_base(new / "adapter_config.json", experiment, meta)
            shutil.copyfile(artifact / PROJECTOR, new / PROJECTOR)
            _write_json(new / "lineage.json", meta["lineage"])
        (new / "experiment.yaml").write_text(to_yaml(published), encoding="utf-8")
        (new / "README.md").write_text(model_card(facts(format, template=_template(experiment))), encoding="utf-8")
    return None


def finished_artifact(run: Path) -> Path:
    """The artifact of the run's last stage, or ``run`` itself if it is an artifact.

    Raises:
        InputError: the last stage is not finished.
    """
    artifact = final_artifact(run)
    if not is_artifact(run):
        last = load_experiment(run / "experiment.yaml").stages[-1].name
        if artifact.name != last:
            raise InputError(
                f"--run {run}: its last stage, {last}, is not finished; finish it, or "
                f"export the finished stage with --run {artifact}"
            )
    return artifact


def check_request(artifact: Path, meta: dict, output: Path, format: str, merge: bool) -> None:
    """Raise :class:`InputError` if the artifact has no such form, or ``output`` cannot be written."""
    if format not in FORMATS:
        raise InputError(f"--format {format}: choose {', '.join(FORMATS)}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output {output}: exists already; choose another folder")
    check_writable(output, "--output")
    if format in ("projector", "peft") and merge:
        raise InputError(f"--merge: --format {format} has no language model; leave one of them out")
    if format == "hf-llava" or merge:
        check_complete(read_artifact(artifact))
    if meta.get("llm") and (format not in ("vlmds", "projector") or merge):
        raise InputError(f"--run {artifact}: its adapter is folded in already; export the run that it came from")
    if not meta["adapter"] and (merge or format == "peft"):
        raise InputError(f"--run {artifact}: stage {meta['stage']} has no adapter; export a stage that trains peft")


def _write_folded(
    artifact: Path,
    output: Path,
    format: str,
    experiment: Experiment,
    published: Experiment,
    device: torch.device,
    facts: Callable[..., Facts],
) -> Parity:
    model = load_unmerged(artifact, experiment, device)
    template, tokens = model.tokenizer.chat_template, model.captioner.projector.num_tokens
    builder = SequenceBuilder(model.tokenizer, experiment.data.prompt, tokens)
    probes, source = make_probes(experiment, model)
    with phase("logits before folding", unit="clips") as shown:
        before = [captioner_logits(model, probe, device) for probe in shown.counting(probes)]
    if isinstance(model.captioner.llm, PeftModel):
        model.captioner.llm = merge_adapter(model.captioner.llm)
    activation = None
    with phase(f"exporting to {output}"), new_folder(output) as new:
        if format == "vlmds":
            kind = "merged"
            _write_merged(new, artifact, model, published)
        elif fits_llava(model):
            kind = "hf-llava"
            activation = write_llava(new, model, experiment, builder)
        else:
            kind = REMOTE
            write_remote(new, model, experiment, builder)
        del model
        gc.collect()  # before a second copy of the weights is loaded
        if format == "vlmds":
            written = VideoCaptioner.from_pretrained(new, device=str(device)).model
            after: Iterable[Tensor] = (captioner_logits(written, probe, device) for probe in probes)
        else:
            write_example(new, published, remote=kind == REMOTE)
            after = folder_logits(new, probes, builder, device, remote=kind == REMOTE)
        parity = compare_logits(before, after, source)
        (new / "README.md").write_text(
            model_card(
                facts(kind, template=template, visual_tokens=tokens, parity=parity, vllm=activation != "linear")
            ),
            encoding="utf-8",
        )
    return parity


def _write_merged(new: Path, artifact: Path, model: Model, published: Experiment) -> None:
    meta = read_artifact(artifact).meta
    with counted_phase("writing the language model", "files"):
        model.captioner.llm.save_pretrained(new / LLM)
    model.tokenizer.save_pretrained(new / LLM)
    shutil.copyfile(artifact / PROJECTOR, new / PROJECTOR)
    (new / "experiment.yaml").write_text(to_yaml(unquantised(published)), encoding="utf-8")
    files = [new / PROJECTOR, *sorted((new / LLM).glob("*.safetensors"))]
    _write_json(
        new / "artifact.json",
        meta
        | {
            "version": VERSION,
            "adapter": False,
            "merged_adapter": published.peft.type,
            "llm": LLM,
            "files": {path.relative_to(new).as_posix(): sha256_of(path) for path in files},
        },
    )


def write_example(folder: Path, experiment: Experiment, remote: bool) -> None:
    """example.py, for this experiment's prompt and number of frames, and frames_vlmds/, its code for videos."""
    source = HOW_TO_LOAD.read_text(encoding="utf-8")
    for name, value in (
        ("NUM_FRAMES", experiment.data.num_frames),
        ("FIT", experiment.data.fit),
        ("PROMPT", experiment.data.prompt),
        ("OPTIONS", {"trust_remote_code": True} if remote else {}),
    ):
        lines = source.splitlines()
        (number,) = (i for i, line in enumerate(lines) if line.startswith(f"{name} = "))
        lines[number] = f"{name} = {value!r}"
        source = "\n".join(lines) + "\n"
    (folder / "example.py").write_text(source, encoding="utf-8")
    (folder / "frames_vlmds").mkdir()
    package = Path(__file__).parents[1]
    for path in (package / "errors.py", *(package / "video" / f"{name}.py" for name in FRAMES)):
        source = path.read_text(encoding="utf-8")
        source = source.replace("from vlmds.video.", "from .").replace("from vlmds.errors ", "from .errors ")
        if "from vlmds" in source or "import vlmds" in source:
            raise RuntimeError(f"{path} has changed: it cannot be exported without vlmds")
        (folder / "frames_vlmds" / path.name).write_text(source, encoding="utf-8")


def _name_base(path: Path, experiment: Experiment, meta: dict) -> None:
    """Write the base model's name and revision into adapter_config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    revision = (meta["lineage"].get("revisions") or {}).get("llm")
    config |= {"base_model_name_or_path": experiment.llm.model, "revision": revision}
    _write_json(path, config)


def _template(experiment: Experiment) -> str | None:
    """The chat template, None where the language model is not on this machine."""
    try:
        return load_tokenizer(experiment.llm, local_files_only=True).chat_template
    except InputError:
        return None


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
