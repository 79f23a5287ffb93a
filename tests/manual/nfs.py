"""Files and training on a real NFS mount; a second mount plays the other machine.

    mount -t nfs4 -o nosharecache SERVER:/export /mnt/a
    mount -t nfs4 -o nosharecache SERVER:/export /mnt/b
    python -m tests.manual.nfs /mnt/a /mnt/b

The two mounts share no cache, as two machines would not. First the functions of vlmds/files.py are
tried on them; then two ranks train with --output on the first, the second rank in a mount namespace
in which the second mount has taken the first one's place. Needs root; the folders get a new folder
each time, which stays.
"""

import argparse
import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import tiny
from tests.training.fixtures import make_shards
from tests.training.launch import SCRIPT, arguments, environment
from vlmds import files
from vlmds.distributed.ranks import free_port
from vlmds.runs.journal import append
from vlmds.training import checkpoint

SHORT = [f"stages.{number}.steps=4" for number in (0, 1)] + ["training.timeout_minutes=10"]


def check(what: str, right: bool) -> None:
    print(f"{'ok    ' if right else 'FAILED'} {what}", flush=True)
    if not right:
        check.failed = True


check.failed = False


def folders(here: Path, there: Path) -> None:
    """Publishing, replacing and removing, while a file of the old folder is open."""
    held = []
    for text in ("one", "two", "three"):
        with files.new_folder(here / "artifact") as new:
            (new / "text").write_text(text)
            save_file({"a": torch.zeros(1)}, new / "a.safetensors")
        held.append((here / "artifact" / "text").open())
        check(
            f"a folder with an open file is replaced: {text}",
            files.is_there(there / "artifact" / "text") and (there / "artifact" / "text").read_text() == text,
        )
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (there / "artifact").iterdir()}
    check(f"modes of the umask: {', '.join(map(oct, modes))}", len(modes) == 1)
    leftovers = list(here.rglob(".nfs*"))
    check(f"what was open stays aside ({len(leftovers)} files)", len(leftovers) == 2)
    for file in held:
        file.close()
    files.remove_folder(here / "artifact")
    with files.new_folder(here / "artifact") as new:
        (new / "text").touch()
    check(
        "nothing of it is left once it is closed",
        not list(here.rglob(".nfs*")) and sorted(path.name for path in here.iterdir()) == ["artifact"],
    )


def freshness(here: Path, there: Path) -> None:
    """A name that was asked for in vain is found at once when the other machine has made it."""
    name = Path("artifacts/align/artifact.json")
    (here / "artifacts").mkdir()
    check("not there yet", not files.is_there(there / name))
    with files.new_folder(here / name.parent) as new:
        (new / name.name).write_text("{}")
    print(f"       (a plain look finds it: {(there / name).is_file()})")
    check("is_there finds it", files.is_there(there / name))
    checkpoints = here / "checkpoints"
    folder = checkpoints / checkpoint.checkpoint_name("align", 2)
    elsewhere = there / "checkpoints" / checkpoint.temporary_name(folder).name
    entries = [checkpoint.write_part(checkpoint.temporary_name(folder), 0, {"a": torch.zeros(9)})]
    (checkpoint.temporary_name(folder) / "rank-00001.safetensors").exists()  # remembers that it is not
    files.is_there(elsewhere / "rank-00000.safetensors")
    entries.append(checkpoint.write_part(elsewhere, 1, {"b": torch.zeros(9)}))
    begin = time.monotonic()
    checkpoint.publish(checkpoint.temporary_name(folder), folder, {}, entries)
    seconds = time.monotonic() - begin
    check(f"a checkpoint of two machines is published ({seconds:.1f} s)", seconds < 5)
    files.is_there(there / "checkpoints" / folder.name / "checkpoint.json")
    check("and is sound on the other", checkpoint.check(there / "checkpoints" / folder.name) is None)


def locks_and_lines(here: Path, there: Path) -> None:
    with (here / "lock").open("w") as first, (there / "lock").open("r+") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            check("a lock keeps the other machine off", False)
        except BlockingIOError:
            check("a lock keeps the other machine off", True)
        except OSError as error:
            check(f"no locks here ({errno.errorcode[error.errno]}), which is allowed", True)
    for number in range(3):
        append(here / "lines", b"%d\n" % number)
    check("lines of a journal", (there / "lines").read_bytes() == b"0\n1\n2\n")
    for data in (b"first", b"second"):
        files.write_once(here / "once", data)
    check("the first file stays", (there / "once").read_bytes() == b"first")


def training(here: Path, there: Path, mounts: tuple[Path, Path], local: Path) -> None:
    models, shards = tiny.make_models(local / "models"), make_shards(local / "data")
    words = [sys.executable, str(SCRIPT), *arguments(models, shards, here / "run", *SHORT)]
    swap = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        f'mount --bind {mounts[1]} {mounts[0]} && exec "$@"',
        "sh",
    ]
    for again in (False, True):
        place = dict(
            WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
        begin = time.monotonic()
        ranks = [
            subprocess.Popen(
                [*prefix, *words],
                env=environment(**place, RANK=str(rank)),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank, prefix in enumerate(([], swap))
        ]
        said = [rank.communicate()[0] for rank in ranks]
        codes = [rank.returncode for rank in ranks]
        check(f"two ranks train, exit codes {codes}, {time.monotonic() - begin:.0f} s", codes == [0, 0])
        if codes != [0, 0]:
            print(*(text[-3000:] for text in said), sep="\n--- rank\n")
            return
        if again:
            check("the same command finds nothing to do", "nothing to do" in said[0])
    for stage in ("align", "finetune"):
        check(
            f"the artifact of {stage} is there for both",
            all(files.is_there(place / "run" / "artifacts" / stage / "artifact.json") for place in (here, there)),
        )
    names = [path.name for path in (here / "run").rglob(".*")]
    check(f"nothing is left over {names}", not names)
    found = checkpoint.checkpoints(there / "run" / "checkpoints", "finetune")
    check(f"{len(found)} checkpoints are sound", found and not any(map(checkpoint.check, found)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mounts", nargs=2, type=Path, metavar="MOUNT")
    parser.add_argument("--files-only", action="store_true", help="leave the training out")
    args = parser.parse_args()
    here = Path(tempfile.mkdtemp(prefix="vlmds-", dir=args.mounts[0]))
    os.chmod(here, 0o755)
    os.listdir(args.mounts[1])
    there = args.mounts[1] / here.name
    for number, trial in enumerate((folders, freshness, locks_and_lines)):
        places = [place / str(number) for place in (here, there)]
        places[0].mkdir()
        os.listdir(there)
        trial(*places)
    if not args.files_only:
        with tempfile.TemporaryDirectory() as local:
            training(here, there, tuple(args.mounts), Path(local))
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
