"""Shared files: modes, write permissions and URLs."""

import errno
import os
import shutil
import stat
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.clips import write_manifest, write_video
from tests.inference.test_video_captioner import made
from vlmds import files
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.export.folder import export_run
from vlmds.packing.pack import pack
from vlmds.runs.folder import check_run_folder
from vlmds.training import checkpoint

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@contextmanager
def umask(value):
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def nobody():
    """Run as a user who owns nothing."""
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, 0)
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


@pytest.fixture
def open_folder():
    """A folder that other users can access, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def modes(root):
    """{path: mode} of all files and folders below."""
    return {path.relative_to(root).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*")}


def check_modes(root, mask):
    found = modes(root)
    assert found
    for name, mode in found.items():
        kind = 0o777 if (root / name).is_dir() else 0o666
        assert mode == kind & ~mask, f"{name} has {mode:04o}"


@pytest.fixture(scope="module")
def artifact(models, tmp_path_factory):
    """Created with another umask."""
    root = tmp_path_factory.mktemp("artifacts")
    with umask(0o027):
        made(models, root / "finetune", "e3")
    check_modes(root, 0o027)
    return root / "finetune"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_written_files_have_the_modes_of_the_umask(artifact, tmp_path_factory, tmp_path, mask):
    videos = tmp_path_factory.mktemp("videos")
    write_video(videos / "a.mp4")
    rows = [{"video": "a.mp4", "caption": "가"}, {"video": "none.mp4", "caption": "나"}]
    manifest = write_manifest(videos / "m.jsonl", rows)
    with umask(mask):
        for format in ("vlmds", "peft", "hf-llava"):
            export_run(artifact, tmp_path / format, format=format, device="cpu")
        export_run(artifact, tmp_path / "merged", merge=True, device="cpu")
        folder = tmp_path / "checkpoints" / "align-0000002"
        temporary = checkpoint.temporary_name(folder)
        entry = checkpoint.write_part(temporary, 0, {"weight/a/0": torch.zeros(3)})
        checkpoint.publish(temporary, folder, {}, [entry])
        pack(manifest, tmp_path / "packed", workers=1, progress=False)
    check_modes(tmp_path, mask)


def test_the_process_keeps_its_umask(tmp_path, monkeypatch):
    """Setting it to read it would affect the files of other threads."""

    def refused(mask):
        raise AssertionError(f"the umask is set to {mask:o}")

    with umask(0o027), monkeypatch.context() as patch:
        patch.setattr(os, "umask", refused)
        with files.new_folder(tmp_path / "new") as new:
            save_file({"a": torch.zeros(1)}, new / "a.safetensors")
        patch.undo()
    assert modes(tmp_path) == {"new": 0o750, "new/a.safetensors": 0o640}


@as_root
def test_a_setgid_folder_gives_its_group(tmp_path):
    team = tmp_path / "team"
    team.mkdir()
    os.chown(team, 0, NOBODY)
    team.chmod(0o2775)
    own = tmp_path / "own" / "adapter"
    own.mkdir(parents=True, mode=0o700)
    save_file({"a": torch.zeros(1)}, own / "a.safetensors")
    with umask(0o002), files.new_folder(team / "finetune") as new:
        files.copy_files(own.parent, new)
        save_file({"a": torch.zeros(1)}, new / "b.safetensors")
    assert modes(team) == {
        "finetune": 0o2775,
        "finetune/adapter": 0o2775,
        "finetune/adapter/a.safetensors": 0o664,
        "finetune/b.safetensors": 0o664,
    }
    assert {path.stat().st_gid for path in team.rglob("*")} == {NOBODY}


def test_a_default_acl_decides_instead_of_the_umask(tmp_path):
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, permissions, number)
        for tag, permissions, number in (
            (0x01, 7, 2**32 - 1),
            (0x04, 5, 2**32 - 1),
            (0x08, 7, NOBODY),  # group NOBODY: rwx
            (0x10, 7, 2**32 - 1),
            (0x20, 0, 2**32 - 1),
        )
    )
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", acl)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EINVAL):
            raise
        pytest.skip("this file system has no ACLs")
    with umask(0o077), files.new_folder(tmp_path / "new") as new:
        save_file({"a": torch.zeros(1)}, new / "a.safetensors")
        (new / "usual").touch()
    usual = tmp_path / "new" / "usual"
    assert stat.S_IMODE(usual.stat().st_mode) == 0o660
    for path in (usual, usual.with_name("a.safetensors")):
        assert path.stat().st_mode == usual.stat().st_mode
        assert os.getxattr(path, "system.posix_acl_access") == os.getxattr(usual, "system.posix_acl_access")


def test_a_folder_is_replaced_even_if_its_files_cannot_be_removed(tmp_path, monkeypatch):
    """As on NFS, when a process has one open."""
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    for text in ("one", "two", "three"):
        with files.new_folder(tmp_path / "a") as new:
            (new / "file").write_text(text)
        files.temporary_folder(tmp_path / "a").joinpath("left").touch()  # left by a killed process
        assert (tmp_path / "a" / "file").read_text() == text
    monkeypatch.undo()
    with files.new_folder(tmp_path / "a") as new:
        (new / "file").touch()
    assert sorted(modes(tmp_path)) == ["a", "a/file"]


def test_a_folder_that_cannot_be_flushed_is_no_error():
    assert os.path.isdir("/proc/self")
    descriptor = os.open("/proc/self", os.O_RDONLY)
    with pytest.raises(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
    files.sync_folder(Path("/proc/self"))


@as_root
@pytest.mark.parametrize("inside", [None, "checkpoints", "metrics.jsonl"])
def test_a_run_folder_of_another_user_is_refused_naming_the_owner(open_folder, inside):
    run = open_folder / "runs" / "e3"
    run.mkdir(parents=True)
    place = run
    if inside:
        run.chmod(0o777)
        place = run / inside
        place.mkdir() if inside == "checkpoints" else place.touch()
    with nobody(), pytest.raises(InputError) as caught:
        check_run_folder(run)
    mode = "0644" if inside == "metrics.jsonl" else "0755"
    assert str(caught.value) == (
        f"--output {run}: {place} cannot be written, it belongs to root (mode {mode}); "
        f"have root run chmod -R g+rwX {place}, or choose another --output"
    )
    new = open_folder / "new" / "deep"
    with nobody(), pytest.raises(InputError) as caught:
        check_run_folder(new)
    assert str(caught.value) == (  # no chmod -R of a parent folder
        f"--output {new}: {open_folder} cannot be written, it belongs to root (mode 0755); "
        f"have root make {new} and give it to you, or choose another --output"
    )
    place.chmod(0o777)
    with nobody():
        check_run_folder(run)
        check_run_folder(run / "new")


@as_root
def test_commands_refuse_folders_of_other_users_in_one_line(open_folder, capsys):
    write_video(open_folder / "a.mp4")
    manifest = write_manifest(open_folder / "m.jsonl", [{"video": "a.mp4", "caption": "가"}])
    with nobody():
        assert main(["pack", str(manifest), str(open_folder / "out")]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"vlmds: OUT {open_folder / 'out'}: {open_folder} cannot be written, it belongs to root "
        f"(mode 0755); have root make {open_folder / 'out'} and give it to you, or choose another "
        "OUT\n"
    )
    with nobody():
        assert main(["pack", "/none.jsonl", "/vlmds-out"]) == 2
    assert "chmod" not in capsys.readouterr().err
    manifest.chmod(0o600)
    (open_folder / "out").mkdir()
    (open_folder / "out").chmod(0o777)
    with nobody():
        assert main(["pack", str(manifest), str(open_folder / "out")]) == 2
    error = capsys.readouterr().err
    assert f"vlmds: {manifest}: " in error and error.count("\n") == 1


def test_an_output_that_is_a_url_or_a_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="--output s3:/+bucket/run: must be a local path"):
        check_run_folder(Path("s3://bucket/run"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is not a folder; choose another --output"):
        check_run_folder(tmp_path / "file" / "run")
