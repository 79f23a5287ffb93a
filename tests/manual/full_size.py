"""All commands at full size on a CPU with 24 GB, with one table at the end.

    python -m tests.manual.full_size DIR --tokenizer DIR

Models of random weights and the real shapes (Qwen3-8B in bf16, the vision half of CLIP-L/14-336),
a few clips, and for each experiment: plan, both stages (the first try killed by SIGKILL in the
second stage, then the same command again), a caption, the adapter folded in. Each line of the table
is one command as a user gives it, on one rank. What is done is not done again: start it again after
a stop; --again does. --tiny does it all with tiny models.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel

from tests import tiny
from vlmds.console.progress import phase
from vlmds.console.quiet import quiet_libraries
from vlmds.demo.clips import make_clips
from vlmds.demo.pretrain import train_tokenizer
from vlmds.experiments.reading import load_experiment
from vlmds.files import new_folder, write
from vlmds.models.pretrained import PUBLISHED_SHAPES

ROOT = Path(__file__).resolve().parents[2]
CLIP, QWEN = "openai/clip-vit-large-patch14-336", "Qwen/Qwen3-8B"
TRAIN = "launch/train.py"
SHARD = "2GB"  # of the weights; as many files as the real repository's, or more
TRAIN_CLIPS, VAL_CLIPS = 8, 2
FRAMES = {"e3": 4}  # where 8 would take hours: the MLP keeps every patch
GIGABYTES = {"models": 18, "run": 5, "merged": 18}  # on disk, at most
BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SAMPLED_SECONDS = 0.5
STEP = re.compile(r"\w+ step \d+/\d+  loss \S+")
PARITY = re.compile("max [|]logit difference.*")
SUM = re.compile("^sum .*", re.MULTILINE)


@dataclass
class Row:
    """What one command took. first_step: seconds until the line of the first optimizer step.
    memory: highest sum of anonymous memory of its processes; written: on disk; predicted: memory by
    plan; all in bytes."""

    name: str
    seconds: float
    first_step: float | None = None
    memory: int | None = None
    written: int | None = None
    predicted: float | None = None
    remarks: str = ""


class Program:
    """The steps in a folder, of which it remembers what is done."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.folder.absolute()
        self.models, self.shards = self.folder / "models", self.folder / "shards"
        self.results = self.folder / "results.json"
        form = {"tiny": args.tiny, "steps": args.steps, "dtype": args.dtype}
        kept = json.loads(self.results.read_text()) if self.results.is_file() else {"form": form}
        if kept["form"] != form:
            sys.exit(f"{self.folder}: was begun with {kept['form']}, not {form}; name another one")
        self.form = form
        self.rows = {name: Row(**row) for name, row in kept.get("rows", {}).items()}

    def run(self) -> None:
        """All steps that were asked for and are not done, then the table."""
        steps: dict[str, Callable[[], Row]] = {"models": self.make_models, "clips": self.pack}
        for exp in self.args.exps:
            for step in (self.plan, self.train, self.resume, self.caption, self.export):
                steps[f"{exp} {step.__name__}"] = lambda step=step, exp=exp: step(exp)
        for name, step in steps.items():
            if self.args.only and name.split()[-1] not in self.args.only:
                continue
            if name in self.rows and not self.args.again:
                print(f"{name}: done before", flush=True)
                continue
            print(f"{name} …", flush=True)
            self.rows[name] = step()
            self.save()
            print(f"{name}: {self.rows[name].seconds:.0f} s {self.rows[name].remarks}", flush=True)
        print(f"\n{self.table()}\nsaved: {self.folder / 'full_size.md'}")

    def save(self) -> None:
        rows = {name: asdict(row) for name, row in self.rows.items()}
        write(self.results, json.dumps({"form": self.form, "rows": rows}, indent=2) + "\n")
        write(self.folder / "full_size.md", self.table() + "\n")

    def table(self) -> str:
        cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        lines = [
            f"{len(os.sched_getaffinity(0))} cores{f' of {cpu[1]}' if cpu else ''}, "
            f"{psutil.virtual_memory().total / 1e9:.1f} GB of memory, one rank, {self.args.dtype} beside NF4",
            "",
            "| | wall, s | first step after, s | peak anonymous memory, GB | written, GB | plan's memory, GB | |",
            "|---|" + "---:|" * 5 + "---|",
        ]
        for row in self.rows.values():
            cells = [
                f"{row.seconds:.0f}",
                number(row.first_step, 1, ".0f"),
                number(row.memory, 1e9, ".2f"),
                number(row.written, 1e9, ".3f"),
                number(row.predicted, 1e9, ".2f"),
            ]
            lines.append(f"| {row.name} | {' | '.join(cells)} | {row.remarks.replace('|', '∣')} |")
        return "\n".join(lines)

    def make_models(self) -> Row:
        started = time.monotonic()
        shutil.rmtree(self.models, ignore_errors=True)
        tokenizer = (
            AutoTokenizer.from_pretrained(self.args.tokenizer)
            if self.args.tokenizer
            else train_tokenizer(["0번 영상입니다."], vocab_size=600)
        )
        with new_folder(self.models) as new:
            if self.args.tiny:
                tiny.make_models(new, tokenizer)
            else:
                write_clip(new / "clip")
                write_qwen(new / "qwen3", tokenizer)
        return Row("models", time.monotonic() - started, written=size(self.models))

    def pack(self) -> Row:
        shutil.rmtree(self.shards, ignore_errors=True)
        manifest = make_clips(self.folder / "clips", train=TRAIN_CLIPS, val=VAL_CLIPS)
        row, _ = self.measured("clips", "pack", str(manifest), str(self.shards))
        row.written = size(self.shards)
        return row

    def plan(self, exp: str) -> Row:
        row, printed = self.measured(
            f"{exp} plan", "plan", "--exp", exp, "--data", str(self.shards), "--set", *self.settings(exp)
        )
        row.predicted = largest(last(SUM, printed))
        return row

    def train(self, exp: str) -> Row:
        """Until it is killed in the second stage."""
        shutil.rmtree(self.run_folder(exp), ignore_errors=True)

        def in_second_stage() -> bool:
            return any(self.run_folder(exp).glob("checkpoints/finetune-*"))

        script = "tests/manual/wait_for_kill.py" if self.args.tiny else TRAIN
        row, printed = self.training(exp, f"{exp} train", script=script, kill=in_second_stage)
        return self.trained(exp, row, f"killed after {last(STEP, printed)}")

    def resume(self, exp: str) -> Row:
        row, printed = self.training(exp, f"{exp} resume")
        if "finetune: going on from" not in printed:
            sys.exit(f"{exp} resume: did not go on from the checkpoint:\n{printed[-3000:]}")
        return self.trained(exp, row, last(STEP, printed))

    def trained(self, exp: str, row: Row, remarks: str) -> Row:
        plan = self.rows.get(f"{exp} plan")
        row.predicted = plan and plan.predicted
        row.written, row.remarks = size(self.run_folder(exp)), remarks
        return row

    def caption(self, exp: str) -> Row:
        clip = next((self.folder / "clips" / "clips").glob("val_*.mp4"))
        out = self.folder / f"{exp}-caption.jsonl"
        out.unlink(missing_ok=True)
        row, _ = self.measured(
            f"{exp} caption",
            "caption",
            "--run",
            str(self.run_folder(exp)),
            str(clip),
            "--max-new-tokens",
            "4",
            "--out",
            str(out),
        )
        record = json.loads(out.read_text())
        row.remarks, row.written = repr(record["caption"]), size(out)
        return row

    def export(self, exp: str) -> Row:
        if self.args.dtype == "float32" and not self.args.tiny:
            return Row(f"{exp} export", 0.0, remarks="left out: folded in float32 it takes 33 GB of memory")
        merged = self.folder / "merged" / exp
        shutil.rmtree(merged, ignore_errors=True)
        row, printed = self.measured(
            f"{exp} export", "export", "--run", str(self.run_folder(exp)), "--merge", "--output", str(merged)
        )
        row.written = size(merged)
        row.remarks = last(PARITY, printed)
        if not self.args.keep:
            shutil.rmtree(merged)
        return row

    def run_folder(self, exp: str) -> Path:
        return self.folder / "runs" / exp

    def training(self, exp: str, name: str, script: str = TRAIN, **how) -> tuple[Row, str]:
        """The same command each time; how: see :meth:`measured`."""
        return self.measured(
            name,
            "--exp",
            exp,
            "--data",
            str(self.shards),
            "--output",
            str(self.run_folder(exp)),
            "--set",
            *self.settings(exp),
            script=script,
            **how,
        )

    def settings(self, exp: str) -> list[str]:
        """Overrides: few steps, a checkpoint after each, validation at a stage's end only."""
        chosen = [
            f"vision.model={self.models / 'clip'}",
            f"llm.model={self.models / 'qwen3'}",
            "training.micro_batch=1",
            "training.gradient_accumulation=2",
            f"data.num_frames={FRAMES.get(exp, 8)}",
            "training.timeout_minutes=600",
        ]
        if self.args.tiny:
            resampler = hasattr(load_experiment(exp).projector, "num_queries")
            chosen = [*tiny.settings(self.models), *(tiny.RESAMPLER if resampler else [])]
        else:
            chosen.append(f"llm.dtype={self.args.dtype}")
        for number in (0, 1):
            chosen += [f"stages.{number}.epochs=null", f"stages.{number}.steps={self.args.steps}"]
        return [
            *chosen,
            "training.checkpoint_every=1",
            "training.validate_every=1000000",
            "logging.every=1",
            "logging.tensorboard=false",
        ]

    def measured(
        self, name: str, *words: str, script: str | None = None, kill: Callable[[], bool] | None = None
    ) -> tuple[Row, str]:
        """Run `vlmds WORDS`, or a script of the repository; (what it took, what it printed).
        kill: by SIGKILL as soon as this is true."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        program = [str(ROOT / script)] if script else ["-m", "vlmds.cli"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        row, started = Row(name, 0.0, memory=0), time.monotonic()
        with log.open("w") as out, phase(name):
            process = subprocess.Popen(
                [sys.executable, *program, *words],
                env=environment,
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                killed = self._watch(process, row, log, started, kill)
            finally:
                kill_group(process)
        row.seconds = time.monotonic() - started
        printed, code = log.read_text(), process.returncode
        if not killed and (code or kill):
            problem = f"exit code {code}" if code else "ended before it could be killed"
            sys.exit(f"{printed[-3000:]}\n{name}: {problem}; see {log}")
        return row, printed

    @staticmethod
    def _watch(process: subprocess.Popen, row: Row, log: Path, started: float, kill: Callable[[], bool] | None) -> bool:
        """Sample until it ends; whether it was killed."""
        while process.poll() is None:
            row.memory = max(row.memory, anonymous_memory(process.pid))
            if row.first_step is None and STEP.search(log.read_text(errors="replace")):
                row.first_step = time.monotonic() - started
            if kill and kill():
                kill_group(process)
                return True
            time.sleep(SAMPLED_SECONDS)
        return False


def write_clip(folder: Path) -> None:
    """The vision half of CLIP-L, fp32 as published, and its preprocessor_config.json."""
    config = copy.deepcopy(PUBLISHED_SHAPES[CLIP])
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(folder)
    side = config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )


def write_qwen(folder: Path, tokenizer) -> None:
    """Qwen3-8B in bf16 with weights drawn at random, file by file: 16.4 GB were never in memory."""
    folder.mkdir(parents=True)
    config = copy.deepcopy(PUBLISHED_SHAPES[QWEN])
    config.dtype, config.architectures = torch.bfloat16, ["Qwen3ForCausalLM"]
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=SHARD)
    generator = torch.Generator().manual_seed(0)
    with phase("writing Qwen3-8B", unit="files") as shown:
        for file, names in shown.counting(plan.filename_to_tensors.items()):
            tensors = {}
            for name in names:
                empty = torch.empty(shapes[name].shape, dtype=torch.bfloat16)
                scale = {"generator": generator, "std": config.initializer_range}
                tensors[name] = empty.fill_(1) if empty.ndim == 1 else empty.normal_(**scale)
            save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    )


def anonymous_memory(pid: int) -> int:
    """Bytes of anonymous memory of a process and all below it; a page that several of them share after a
    fork is counted once, in parts (PSS)."""
    total = 0
    try:
        tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    for member in tree:
        try:
            totals = Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        found = re.search(r"Pss_Anon:\s+(\d+) kB", totals)
        total += 1024 * int(found[1]) if found else 0
    return total


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def size(place: Path) -> int:
    files = [place] if place.is_file() else place.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def largest(sizes: str) -> float:
    """Bytes of the largest of the sizes in a line of vlmds plan, one for each stage."""
    found = re.findall(r"([\d.,]+) ([kMGT]?B)\b", sizes)
    return max(float(number.replace(",", "")) * BYTES[unit] for number, unit in found)


def last(pattern: re.Pattern, text: str) -> str:
    return pattern.findall(text)[-1]


def number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value / unit, form)


def fast_dtype() -> str:
    """bfloat16 where the CPU computes in it. Elsewhere PyTorch falls back on code for which one product
    of 230 x 12,288 by 12,288 x 4,096 took 116 s on two cores, against 0.4 s in float32."""
    flags = Path("/proc/cpuinfo").read_text()
    return "bfloat16" if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) else "float32"


def check_disk(args: argparse.Namespace) -> None:
    """State what the disk needs, and end the program if it is not there."""
    if args.tiny:
        return
    models = 0 if (args.folder / "models").is_dir() else GIGABYTES["models"]
    merged = GIGABYTES["merged"] * (len(args.exps) if args.keep else 1)
    if args.only and "export" not in args.only:
        merged = 0
    need = models + GIGABYTES["run"] * len(args.exps) + merged
    free = shutil.disk_usage(args.folder).free / 1e9
    print(f"needs at most {need} GB in {args.folder}, where {free:.0f} GB are free", flush=True)
    if free < need:
        sys.exit("make room there, name fewer --exps or --only some steps, or another folder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path)
    add("--tokenizer", metavar="DIR", help="of the real model (default: a tiny one)")
    add("--exps", nargs="+", default=["e7", "e3"], metavar="EXP", help="default: e7 e3")
    add("--steps", type=int, help="of each stage (default: 2; 40 with --tiny)")
    add(
        "--only", nargs="+", metavar="STEP", choices=("models", "clips", "plan", "train", "resume", "caption", "export")
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default=fast_dtype(),
        help="of what is not in NF4 (default: bfloat16 if the CPU computes in it; here: %(default)s)",
    )
    add("--again", action="store_true", help="also what is done")
    add("--keep", action="store_true", help="the folders with folded weights, 17 GB each")
    add("--tiny", action="store_true", help="tiny models, to try the program itself")
    args = parser.parse_args()
    args.steps = args.steps or (40 if args.tiny else 2)
    args.folder.mkdir(parents=True, exist_ok=True)
    check_disk(args)
    quiet_libraries()
    Program(args).run()


if __name__ == "__main__":
    main()
