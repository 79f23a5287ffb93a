"""The model card of an exported folder: README.md, with the front matter that the Hugging Face hub
reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.evaluation.evaluate import read_evaluation
from vlmds.experiments.schema import Experiment
from vlmds.export.parity import Parity
from vlmds.models.artifact import weights_sha256
from vlmds.models.hub import is_local

REMOTE = "remote"
"""The kind of folder that `--format hf-llava` gives where LLaVA's architecture does not fit."""
FRONT = {  # library_name, base_model_relation
    "vlmds": ("vlmds", "adapter"),
    "peft": ("peft", "adapter"),
    "merged": ("vlmds", "finetune"),
    "hf-llava": ("transformers", "finetune"),
    REMOTE: ("transformers", "finetune"),
}


@dataclass(frozen=True)
class Facts:
    """What a card tells. kind: a key of FRONT. meta: artifact.json. visual_tokens: per clip.
    template: the tokenizer's chat template. run: of the artifact, None if it lies alone. vllm:
    whether it has what a LLaVA folder needs."""

    kind: str
    meta: dict
    experiment: Experiment
    artifact: Path
    run: Path | None
    template: str | None = None
    visual_tokens: int | None = None
    parity: Parity | None = None
    vllm: bool = True


def model_card(facts: Facts) -> str:
    """README.md."""
    exp = facts.experiment
    sections = [
        f"# {exp.name}: Korean captions of videos",
        f"{exp.vision.model} looks at {exp.data.num_frames} frames, a {exp.projector.type} "
        f"projector turns what it sees into visual tokens, and {exp.llm.model} with "
        f"{_adapter(facts)} says in Korean what happens. Trained with vlmds.",
        "## Use\n\n" + _use(facts),
        "## Results\n\n" + (_results(facts) or "Not evaluated yet (`vlmds evaluate`)."),
        "## What it is made of\n\n" + _parts(facts),
        "## Limits\n\n" + _limits(facts),
    ]
    return _front_matter(facts) + "\n\n".join(sections) + "\n"


def _front_matter(facts: Facts) -> str:
    exp = facts.experiment
    library, relation = FRONT[facts.kind]
    bases = [name for name in (exp.llm.model, exp.vision.model) if not is_local(name)]
    front = {
        "language": "ko",
        "library_name": library,
        "pipeline_tag": "video-text-to-text",
        "tags": ["vlmds", "video-captioning", exp.projector.type, exp.peft.type],
    }
    if bases:  # the hub takes no paths
        front |= {"base_model": bases, "base_model_relation": relation}
    return f"---\n{yaml.safe_dump(front, allow_unicode=True, sort_keys=False)}---\n\n"


def _adapter(facts: Facts) -> str:
    if not (facts.meta["adapter"] or facts.meta.get("merged_adapter")):
        return "no adapter"
    name = {"lora": "a LoRA", "dora": "a DoRA"}[facts.experiment.peft.type]
    folded = facts.kind in ("merged", "hf-llava", REMOTE) or facts.meta.get("merged_adapter")
    return f"{name} adapter (r={facts.experiment.peft.r}){', folded in,' if folded else ''}"


def _use(facts: Facts) -> str:
    exp = facts.experiment
    if facts.kind in ("vlmds", "merged"):
        return (
            "```python\nfrom vlmds.inference.video_captioner import VideoCaptioner\n"
            'captioner = VideoCaptioner.from_pretrained("this folder, or owner/name")\n'
            'print(*captioner.caption(["video.mp4"]))\n```'
            + (
                "\n\n`llm/` is a plain language model: `AutoModelForCausalLM` loads it."
                if facts.kind == "merged"
                else ""
            )
        )
    if facts.kind == "peft":
        return (
            "```python\nfrom peft import PeftModel\n"
            f'base = AutoModelForCausalLM.from_pretrained("{exp.llm.model}")\n'
            'llm = PeftModel.from_pretrained(base, "this folder")\n```\n\n'
            "This is the language model's adapter. `projector.safetensors` holds the projector "
            "that experiment.yaml describes; without it the model sees no video."
        )
    trust = ", trust_remote_code=True" if facts.kind == REMOTE else ""
    text = (
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f'processor = AutoProcessor.from_pretrained("this folder"{trust})\n'
        f'model = AutoModelForImageTextToText.from_pretrained("this folder"{trust})\n```\n\n'
        f"A clip is a user message of {exp.data.num_frames} images, then the prompt. The "
        "frames must be chosen and resized as in training: `python example.py VIDEO...` does that, "
        "with av and pillow alone."
    )
    if facts.kind == REMOTE:
        return text + (
            "\n\n`trust_remote_code=True` lets transformers run the Python files of this folder on "
            "your machine, with your rights. They are short: read them, and name a commit with "
            "`revision=` where you load from the hub."
        )
    if not facts.vllm:
        return text + (
            "\n\nvLLM cannot serve it: it has no linear activation, and this language "
            "model is too narrow to do without (twice the tower's width)."
        )
    return text + (
        f"\n\nvLLM: `--limit-mm-per-prompt '{{\"image\": {exp.data.num_frames}}}'`; send frames "
        "that example.py's `read_frames` returns."
    )


def _results(facts: Facts) -> str:
    """Of every evaluation of these very weights."""
    if facts.run is None:
        return ""
    weights, parts = weights_sha256(facts.artifact), []
    for path in sorted(facts.run.glob("evaluation/*/metrics.json")):
        try:
            found, _ = read_evaluation(path.parent)
        except InputError:  # another version's, or damaged
            continue
        settings = found["settings"]
        if settings["weights_sha256"] != weights:
            continue
        search = ", ".join(f"{k} {v}" for k, v in settings.get("generation", {}).items())
        lines = [
            f"Split {settings['split']}, {counted(found['clips'], 'clip')}, language model in "
            f"{settings['llm_precision']}, {search}:",
            "",
            "| metric | value | 95% interval |",
            "|---|---|---|",
        ]
        lines += [
            f"| {name} | {m['value']:.2f} | {m['low']:.2f} to {m['high']:.2f} |" for name, m in found["metrics"].items()
        ]
        lines += [f"\nWarning: {warning}" for warning in found["looking"]["warnings"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _parts(facts: Facts) -> str:
    exp, lineage = facts.experiment, facts.meta["lineage"]
    revisions, sampling = lineage.get("revisions") or {}, lineage.get("sampling") or {}
    peft = exp.peft

    def base(part: str) -> str:
        name, commit = getattr(exp, part).model, revisions.get(part)
        return f"{name}, " + (f"commit {commit}" if commit else "no hub commit recorded")

    precision = "NF4 (4 bit, double quantisation)" if exp.llm.load_in_4bit else exp.llm.dtype
    rows = [
        ("vision tower", base("vision")),
        ("features", f"layer {exp.vision.feature_layer}, pooled {exp.vision.pool} x {exp.vision.pool}"),
        ("language model", base("llm")),
        ("trained on it in", precision),
        ("projector", ", ".join(f"{k} {v}" for k, v in exp.projector.model_dump().items())),
        ("adapter", f"{peft.type}, r {peft.r}, alpha {peft.alpha:g}, {', '.join(peft.target_modules)}"),
        ("prompt", exp.data.prompt),
        ("frames", f"{exp.data.num_frames}, sampled {sampling.get('sampler', '(not recorded)')}"),
        ("resizer", sampling.get("resizer", "(not recorded)")),
        ("last stage", facts.meta["stage"]),
        ("data fingerprint", lineage.get("data_fingerprint", "(not recorded)")),
    ]
    if facts.visual_tokens:
        rows.append(("visual tokens", f"{facts.visual_tokens:,} a clip"))
    if facts.template:
        rows.append(("chat template sha256", hashlib.sha256(facts.template.encode()).hexdigest()))
    rows += [(f"sha256 of {name}", value) for name, value in (lineage.get("weights") or {}).items()]
    text = "| | |\n|---|---|\n" + "\n".join(
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows
    )
    if facts.parity:
        text += (
            "\n\nHow far this folder's logits are from those of the base model with the "
            f"adapter beside it, both in {exp.llm.dtype}: {facts.parity}."
        )
    return text


def _limits(facts: Facts) -> str:
    exp = facts.experiment
    points = [
        f"It sees {exp.data.num_frames} frames without sound: what happens between is guessed.",
        "It learned to answer its prompt in Korean; other prompts and languages are not tested.",
        "Captions can be wrong or biased as the data is. The licences of the base models apply.",
    ]
    if exp.llm.load_in_4bit and facts.kind in ("merged", "hf-llava", REMOTE):
        points.append(
            f"The adapter was trained beside NF4 weights and is folded into "
            f"{exp.llm.dtype} ones, so that captions can differ from those that were evaluated."
        )
    if exp.peft.type == "dora" and facts.kind in ("vlmds", "peft"):
        points.append(
            "vLLM refuses DoRA adapters: to serve this model there, export it with "
            "`--merge` or `--format hf-llava`, which fold the adapter in."
        )
    return "\n".join(f"- {point}" for point in points)
