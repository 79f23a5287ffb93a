"""`vlmds sweep --demo --known`: a sweep whose result is known, to check models, evaluation and verdict together.

Every experiment learns all five tasks of :mod:`vlmds.demo.known_scenes`; :mod:`vlmds.demo.known_rows` makes a table of
what is known of them and what was measured.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from vlmds.console.progress import duration, log_line
from vlmds.demo.known_clips import FRAMES, make_known_clips
from vlmds.demo.known_models import KNOWN
from vlmds.demo.known_rows import CONTROLS, Row, known_rows, rows_table
from vlmds.demo.known_scenes import TASKS, sets_of_split
from vlmds.demo.pretrain import make_tiny_models
from vlmds.demo.run import IMAGE_SIZE, tiny_form
from vlmds.evaluation.evaluated_runs import load_run
from vlmds.files import write
from vlmds.packing.pack import pack
from vlmds.training.sweep import STOPPED, Job, plan_jobs, run_jobs, status_table

QUERIES = 16  # of the resamplers: an eighth of the 128 visual tokens of linear and mlp


@dataclass(frozen=True)
class Form:
    """One experiment of the sweep: a packaged one in tiny form, with what is changed."""

    name: str
    exp: str
    temporal_embedding: bool = True
    num_frames: int = FRAMES
    pool: int = 1
    seed: int = 0


@dataclass(frozen=True)
class KnownSize:
    """train, val: clips of each task. forms: in the order of training. clip_steps, llm_steps: of pre-training.
    epochs: of (align, finetune), by whether the projector is a resampler."""

    train: int
    val: int
    clip_steps: int
    llm_steps: int
    forms: tuple[Form, ...]
    epochs: tuple[tuple[int, int], tuple[int, int]]


ONE_FRAME = Form("e3-one-frame", "e3", num_frames=1)
FULL = KnownSize(
    train=480,
    val=210,
    clip_steps=900,
    llm_steps=900,
    forms=(
        *(Form(f"{exp}-no-time", exp, temporal_embedding=False) for exp in ("e5", "e7")),
        ONE_FRAME,
        *(Form(exp, exp) for exp in CONTROLS),
        *(Form(f"e3-pool{pool}", "e3", pool=pool) for pool in (2, 4)),
        *(Form(f"e3-seed{seed}", "e3", seed=seed) for seed in (1, 2, 3)),
    ),
    epochs=((5, 2), (8, 2)),
)
QUICK = KnownSize(
    train=120,
    val=50,
    clip_steps=500,
    llm_steps=350,
    forms=(
        Form("e7-no-time", "e7", temporal_embedding=False),
        ONE_FRAME,
        Form("e7", "e7"),
        Form("e3", "e3"),
        Form("e3-pool4", "e3", pool=4),
    ),
    epochs=((4, 1), (6, 2)),
)
"""Without e1, e5, pooling by 2 and the other seeds of e3."""


def prepare_known(output: Path, size: KnownSize) -> list[str]:
    """Clips, tiny models and packed datasets in `output`, where they are missing; returns the experiment files."""
    output.mkdir(parents=True, exist_ok=True)
    log_line("known: clips")
    manifest = make_known_clips(output / "data", train=size.train, val=size.val)
    log_line("known: pre-training of the tiny CLIP and Qwen3")
    make_tiny_models(
        output / "models", image_size=IMAGE_SIZE, clip_steps=size.clip_steps, llm_steps=size.llm_steps, subject=KNOWN
    )
    log_line("known: packing")
    for frames in sorted({form.num_frames for form in size.forms}):
        pack(
            manifest,
            shards_of(output, frames),
            store="frames",
            image_size=IMAGE_SIZE,
            num_frames=frames,
            progress=False,
        )
    return [str(write_form(form, output, size)) for form in size.forms]


def validation_clips(size: KnownSize) -> int:
    return sum(len(own) for task in TASKS for own in sets_of_split(task, "val", size.val, 0))


def shards_of(output: Path, num_frames: int) -> Path:
    return output / f"shards-{num_frames}"


def write_form(form: Form, output: Path, size: KnownSize) -> Path:
    """Write output/known-{name}.yaml, which extends the experiment's tiny form of `vlmds demo`."""
    base = tiny_form(form.exp, output, temporal_embedding=form.temporal_embedding)
    resampler = form.exp in ("e5", "e6", "e7", "e8")
    align, finetune = size.epochs[resampler]
    rates = ("3.0e-4", "2.0e-4") if resampler else ("2.0e-3", "5.0e-4")  # as the demo has them
    lines = [
        f"# {form.name} of the known-truth sweep, written by vlmds sweep --demo --known",
        f"extends: {base.name}",
        f"name: {form.name}",
        f"priority: {1 + [own.name for own in size.forms].index(form.name)}",
        f"vision: {{pool: {form.pool}}}",
        f"data: {{path: {json.dumps(str(shards_of(output, form.num_frames)))}, num_frames: {form.num_frames}}}",
        f"training: {{seed: {form.seed}, validate_every: 10000, checkpoint_every: 200, blind_check: null}}",
        "stages:",
        f"  - {{name: align, train: [projector], lr: {rates[0]}, epochs: {align}}}",
        f"  - {{name: finetune, train: [projector, peft], lr: {rates[1]}, epochs: {finetune}}}",
    ]
    if resampler:
        lines.append(f"projector: {{num_queries: {QUERIES}}}")
    path = output / f"known-{form.name}.yaml"
    write(path, "\n".join(lines) + "\n")
    return path


def known_sweep(
    output: Path,
    size: KnownSize,
    launcher: str,
    environment: dict[str, str],
    evaluate_options: tuple[str, ...] = (),
    overrides: tuple[str, ...] = (),
) -> int:
    """Prepare, train and evaluate what is missing, then print the table and write known.json and known.md.

    Returns:
        0 if all exact rows pass, 3 if a signal stopped a run, else 1.
    """
    started = time.perf_counter()
    exps = prepare_known(output, size)
    prepared = time.perf_counter() - started
    jobs = plan_jobs(exps, output / "runs", overrides=overrides)
    try:
        code = run_jobs(jobs, None, launcher, evaluate_options, environment)
    finally:
        log_line(status_table(jobs))
    if code == STOPPED:
        return code
    rows = rows_of_jobs(jobs)
    seconds = {"preparation": round(prepared, 1), "total": round(time.perf_counter() - started, 1)}
    resumed = any(job.state == "done before" for job in jobs)
    save_rows(output, rows, size, seconds, resumed)
    return 0 if all(row.outcome == "pass" for row in rows if row.exact) else 1


def rows_of_jobs(jobs: list[Job]) -> list[Row]:
    return known_rows({job.name: load_run(job.run) for job in jobs if job.evaluated}, [job.name for job in jobs])


def save_rows(output: Path, rows: list[Row], size: KnownSize, seconds: dict[str, float], resumed: bool) -> None:
    """Print the table and write output/known.json and output/known.md."""
    table = rows_table(rows)
    note = f"{validation_clips(size):,} validation clips; {duration(seconds['total'])} in all"
    note += ", without what an earlier start had finished." if resumed else "."
    facts = {"rows": [row.record() for row in rows], "seconds": seconds, "resumed": resumed}
    write(output / "known.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write(output / "known.md", f"{table}\n\n{note}\n")
    log_line(f"{table}\n\n{note}\nsaved: {output / 'known.json'} and known.md")
