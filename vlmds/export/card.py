"""Model card of an exported folder: README.md with the front matter of the Hugging Face hub, in
English with a Korean summary."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from vlmds.console.text import counted
from vlmds.errors import InputError
from vlmds.evaluation.blind import doubts
from vlmds.evaluation.saved import read_evaluation
from vlmds.experiments.schema import Experiment
from vlmds.export.parity import Parity
from vlmds.models.artifact import weights_sha256
from vlmds.models.hub import is_local

REMOTE = "remote"
"""Kind of the folder that `--format hf-llava` writes where LLaVA's architecture does not fit."""
FRONT = {  # library_name, base_model_relation
    "vlmds": ("vlmds", "adapter"),
    "projector": ("vlmds", "adapter"),
    "peft": ("peft", "adapter"),
    "merged": ("vlmds", "finetune"),
    "hf-llava": ("transformers", "finetune"),
    REMOTE: ("transformers", "finetune"),
}


@dataclass(frozen=True)
class Facts:
    """Contents of a card. kind: a key of FRONT. meta: artifact.json. visual_tokens: per clip.
    template: the tokenizer's chat template. run: folder of the artifact's run, None without one.
    vllm: whether vLLM can serve the folder."""

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
    """Text of README.md."""
    exp = facts.experiment
    results, doubtful = _results(facts)
    alone = facts.kind == "projector"
    sections = [
        f"# {exp.name}: " + (f"{exp.projector.type} projector" if alone else "Korean captions of videos"),
        f"{exp.vision.model} encodes {exp.data.num_frames} frames, a {exp.projector.type} projector "
        f"turns the features into visual tokens, and {exp.llm.model} with {_adapter(facts)} writes a "
        "caption in Korean. Trained with vlmds." + (" Only the projector is in this folder." if alone else ""),
        "## Use\n\n" + _use(facts),
        "## Results\n\n"
        + (results or ("Evaluations are of the whole model." if alone else "Not evaluated yet (`vlmds evaluate`).")),
        "## Components\n\n" + _parts(facts),
        "## Limits\n\n" + _limits(facts),
        "## 한국어 요약\n\n" + _korean(facts, bool(results) or alone, doubtful),
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
    if facts.kind == "projector":
        return (
            "```yaml\n# in the experiment file of another training with vlmds\nprojector:\n"
            f"  type: {exp.projector.type}\n  init: this folder, or owner/name\n```\n\n"
            "The training then starts from these weights. It must have the same projector, vision tower, feature "
            "layer, pooling and language model."
        )
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
            "This is the language model's adapter. `projector.safetensors` is the projector that "
            "experiment.yaml describes; without it the model gets no video."
        )
    trust = ", trust_remote_code=True" if facts.kind == REMOTE else ""
    text = (
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f'processor = AutoProcessor.from_pretrained("this folder"{trust})\n'
        f'model = AutoModelForImageTextToText.from_pretrained("this folder"{trust})\n```\n\n'
        f"A clip is a user message of {exp.data.num_frames} images, then the prompt. The "
        "frames must be chosen and resized as in training; `python example.py VIDEO...` does this "
        "with only av and pillow added."
    )
    if facts.kind == REMOTE:
        return text + (
            "\n\n`trust_remote_code=True` lets transformers run the Python files of this folder on "
            "your machine, with your permissions. They are short: read them, and pin a commit with "
            "`revision=` when you load from the hub."
        )
    if not facts.vllm:
        return text + (
            "\n\nvLLM cannot serve it: vLLM has no linear activation, and this language model is "
            "not twice as wide as the vision tower, which would avoid it."
        )
    return text + (
        f"\n\nvLLM: `--limit-mm-per-prompt '{{\"image\": {exp.data.num_frames}}}'`; send frames "
        "that example.py's `read_frames` returns."
    )


def _results(facts: Facts) -> tuple[str, list[str]]:
    """Tables of all evaluations of exactly these weights; Korean warnings that the model may not use
    the video."""
    if facts.run is None or (facts.kind == "projector" and facts.meta["adapter"]):  # the figures are the whole model's
        return "", []
    weights, parts, korean = weights_sha256(facts.artifact), [], []
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
        for doubt in doubts(found["looking"]):
            lines.append(f"\nWarning: {doubt['en']}")
            korean.append(doubt["ko"])
        parts.append("\n".join(lines))
    return "\n\n".join(parts), korean


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
        ("features", f"layer {exp.vision.feature_layer}, pooling {exp.vision.pool} x {exp.vision.pool}"),
        ("language model", base("llm")),
        ("its precision in training", precision),
        ("projector", ", ".join(f"{k} {v}" for k, v in exp.projector.model_dump(exclude={"init"}).items())),
        ("adapter", f"{peft.type}, r {peft.r}, alpha {peft.alpha:g}, {', '.join(peft.target_modules)}"),
        ("prompt", exp.data.prompt),
        ("frames", f"{exp.data.num_frames}, sampled {sampling.get('sampler', '(not recorded)')}"),
        ("resizer", sampling.get("resizer", "(not recorded)")),
        ("last stage", facts.meta["stage"]),
        ("data fingerprint", lineage.get("data_fingerprint", "(not recorded)")),
    ]
    if init := lineage.get("init"):
        rows.append(("sha256 of the projector that training started from", init["projector_sha256"]))
    if facts.visual_tokens:
        rows.append(("visual tokens", f"{facts.visual_tokens:,} per clip"))
    if facts.template:
        rows.append(("chat template sha256", hashlib.sha256(facts.template.encode()).hexdigest()))
    rows += [(f"sha256 of {name}", value) for name, value in (lineage.get("weights") or {}).items()]
    text = "| | |\n|---|---|\n" + "\n".join(
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows
    )
    if facts.parity:
        text += (
            "\n\nDifference between this folder's logits and those of the base model with the "
            f"adapter not folded in, both in {exp.llm.dtype}: {facts.parity}."
        )
    return text


def _limits(facts: Facts) -> str:
    exp = facts.experiment
    points = [
        f"It gets {exp.data.num_frames} frames and no sound: what happens between frames is guessed.",
        "It was trained on its own prompt, in Korean; other prompts and languages are not tested.",
        "Captions can be wrong, and biased like the training data. The licences of the base models apply.",
    ]
    if exp.llm.load_in_4bit and facts.kind in ("merged", "hf-llava", REMOTE):
        points.append(
            "The adapter was trained with NF4 base weights and is folded into "
            f"{exp.llm.dtype} weights, so captions can differ from those that were evaluated."
        )
    if exp.peft.type == "dora" and facts.kind in ("vlmds", "peft"):
        points.append(
            "vLLM refuses DoRA adapters: to serve this model there, export it with "
            "`--merge` or `--format hf-llava`, which fold the adapter in."
        )
    return "\n".join(f"- {point}" for point in points)


def _korean(facts: Facts, evaluated: bool, doubtful: list[str]) -> str:
    """The card's text in Korean; code and tables are above."""
    exp = facts.experiment
    adapter = "" if _adapter(facts) == "no adapter" else f", {exp.peft.type} 어댑터 r={exp.peft.r}"
    text = (
        f"비전 타워({exp.vision.model})가 프레임 {exp.data.num_frames}장을 인코딩하고, {exp.projector.type} 프로젝터가 그 "
        f"특징을 시각 토큰으로 바꾸며, 언어 모델({exp.llm.model}{adapter})이 한국어 캡션을 생성합니다. vlmds로 학습했습니다. "
        "사용법, 지표, 구성은 위의 Use, Results, Components에 있습니다."
        + (
            " 이 폴더에는 프로젝터만 있으며, 다른 학습의 `projector.init`으로 씁니다."
            if facts.kind == "projector"
            else ""
        )
    )
    points = [
        f"소리 없이 프레임 {exp.data.num_frames}장만 보므로 프레임 사이에 일어난 일은 추측입니다.",
        "학습에 쓴 프롬프트와 한국어만 검증했습니다. 다른 프롬프트나 언어는 시험하지 않았습니다.",
        "캡션이 틀리거나 학습 데이터의 편향을 따를 수 있습니다. 기반 모델의 라이선스가 적용됩니다.",
    ]
    if exp.llm.load_in_4bit and facts.kind in ("merged", "hf-llava", REMOTE):
        points.append(
            f"어댑터는 NF4 가중치로 학습했지만 {exp.llm.dtype} 가중치에 병합했으므로 평가할 때와 캡션이 다를 수 있습니다."
        )
    if exp.peft.type == "dora" and facts.kind in ("vlmds", "peft"):
        points.append(
            "vLLM은 DoRA 어댑터를 지원하지 않습니다. `--merge` 또는 `--format hf-llava`로 내보내면 서빙할 수 있습니다."
        )
    if not evaluated:
        points.append("아직 평가하지 않았습니다(`vlmds evaluate`).")
    points += [f"경고: {warning}" for warning in doubtful]
    return f"{text}\n\n" + "\n".join(f"- {point}" for point in points)
