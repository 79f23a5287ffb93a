"""`vlmds export`: one folder, in one of these forms.

    vlmds             the artifact itself: experiment.yaml, artifact.json, projector, adapter/
    vlmds --merge     the same with llm/, the language model with the adapter folded in, instead
    peft              the adapter as PEFT's users expect it, and the projector
    hf-llava          a LLaVA folder for plain transformers (:mod:`vlmds.export.llava`), or where
                      that architecture does not fit, one with code (:mod:`vlmds.export.remote`)

Each has a model card. A folder whose weights were folded is loaded back before it gets its name,
and its logits are held against those of the model it was made of.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmds.console.progress import phase
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment, to_yaml
from vlmds.experiments.schema import Experiment
from vlmds.export.card import REMOTE, Facts, model_card
from vlmds.export.llava import fits_llava, write_llava
from vlmds.export.merge import load_unmerged, merge_adapter, unquantised
from vlmds.export.parity import Parity, Probe, captioner_logits, compare_logits, make_probes, supervised
from vlmds.export.processor import user_message
from vlmds.export.remote import write_remote
from vlmds.files import check_writable, copy_files, new_folder, sha256_of
from vlmds.inference.video_captioner import VideoCaptioner, choose_device
from vlmds.models.artifact import LLM, VERSION, is_artifact, read_artifact
from vlmds.models.assemble import Model
from vlmds.models.captioner import IGNORE
from vlmds.models.language import load_tokenizer
from vlmds.models.pretrained import counted_phase
from vlmds.models.sequences import SequenceBuilder
from vlmds.runs.folder import final_artifact

FORMATS = ("vlmds", "peft", "hf-llava")
PEFT_CARD = ("README.md",)  # an empty form
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
    """Write ``output``, whole or not at all; returns the parity of a folder with folded weights.

    Args:
        run: run folder, all of whose stages are finished, or an artifact.
        format: one of FORMATS. merge: fold the adapter in; hf-llava always does.
        device: where weights are folded (default: the first GPU, else the CPU).
        overrides: of the experiment, such as ``llm.model=/models/Qwen3-8B``; the folder names
            these models, too.

    Raises:
        InputError: no finished run, no adapter to fold or to write, a folder that is not empty,
            other base weights than the artifact's.
    """
    artifact = finished_artifact(run)
    meta = read_artifact(artifact).meta
    experiment = load_experiment(artifact / "experiment.yaml", overrides)
    check_request(artifact, meta, output, format, merge)
    places = (run, artifact.parent.parent)
    run_folder = next((place for place in places if (place / "run.json").is_file()), None)
    published = experiment.model_copy(
        update={  # where the data lies is nobody else's business
            "data": experiment.data.model_copy(update={"path": None, "blend": None, "cache_dir": None})
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
        else:
            copy_files(artifact / "adapter", new, PEFT_CARD)
            _name_base(new / "adapter_config.json", experiment, meta)
            shutil.copyfile(artifact / "projector.safetensors", new / "projector.safetensors")
            _write_json(new / "lineage.json", meta["lineage"])
        (new / "experiment.yaml").write_text(to_yaml(published), encoding="utf-8")
        (new / "README.md").write_text(model_card(facts(format, template=_template(experiment))), encoding="utf-8")
    return None


def finished_artifact(run: Path) -> Path:
    """The artifact of the run's last stage, or ``run`` itself if it is an artifact.

    Raises:
        InputError: there is none yet.
    """
    artifact = final_artifact(run)
    if not is_artifact(run):
        last = load_experiment(run / "experiment.yaml").stages[-1].name
        if artifact.name != last:
            raise InputError(
                f"--run {run}: its last stage, {last}, is not finished; finish it, or "
                f"export what there is with --run {artifact}"
            )
    return artifact


def check_request(artifact: Path, meta: dict, output: Path, format: str, merge: bool) -> None:
    """Raise :class:`InputError` if the artifact cannot be exported so, or not to there."""
    if format not in FORMATS:
        raise InputError(f"--format {format}: choose {', '.join(FORMATS)}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"--output {output}: is there already; choose another folder")
    check_writable(output, "--output")
    if format == "peft" and merge:
        raise InputError("--merge: --format peft is the adapter itself; leave one of them out")
    if meta.get("llm") and (format != "vlmds" or merge):
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
        elif fits_llava(model.captioner.projector, model.tower):
            kind = "hf-llava"
            activation = write_llava(new, model, experiment, builder)
        else:
            kind = REMOTE
            write_remote(new, model, experiment, builder)
        del model
        gc.collect()  # before a second copy of the weights is loaded
        if format == "vlmds":
            written = VideoCaptioner.from_pretrained(new, device=str(device)).model

            def after(number: int) -> Tensor:
                return captioner_logits(written, probes[number], device)
        else:
            write_example(new, published, remote=kind == REMOTE)
            after = _exported_logits(new, probes, builder, device, remote=kind == REMOTE)
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
    shutil.copyfile(artifact / "projector.safetensors", new / "projector.safetensors")
    (new / "experiment.yaml").write_text(to_yaml(unquantised(published)), encoding="utf-8")
    files = [new / "projector.safetensors", *sorted((new / LLM).glob("*.safetensors"))]
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


def _exported_logits(
    folder: Path, probes: list[Probe], builder: SequenceBuilder, device: torch.device, remote: bool
) -> Callable[[int], Tensor]:
    """Gives each probe's logits by the folder's own model and processor, as loaded anew."""
    options = {"trust_remote_code": True} if remote else {}
    processor = AutoProcessor.from_pretrained(folder, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).to(device).eval()

    @torch.no_grad()
    def logits(number: int) -> Tensor:
        probe = probes[number]
        text = processor.apply_chat_template(
            user_message(probe.prompt or builder.prompt, len(probe.frames)), add_generation_prompt=True
        )
        images = [Image.fromarray(np.ascontiguousarray(f.transpose(1, 2, 0))) for f in probe.frames]
        inputs = processor(images=images, text=text, return_tensors="pt").to(device)
        caption = [i for i in probe.sequence.labels if i != IGNORE]
        ids = torch.cat([inputs["input_ids"], torch.tensor([caption], device=device)], dim=1)
        if ids.shape[1] != len(probe.sequence.input_ids):
            raise InputError(
                f"the prompt {probe.prompt!r} of a clip holds "
                f"{processor.image_token}, which stands for a visual token; take it out of the data"
            )
        return (
            model(
                input_ids=ids,
                pixel_values=inputs["pixel_values"],
                use_cache=False,
                logits_to_keep=supervised(probe.sequence).to(device),
            )
            .logits.float()
            .cpu()
        )

    return logits


def _name_base(path: Path, experiment: Experiment, meta: dict) -> None:
    """What adapter_config.json says of the base model."""
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
