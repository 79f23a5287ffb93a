"""huggingface_hub: the cache's layout and what vlmds/models/hub.py and fetch.py use of its internals."""

import inspect

import pytest
from huggingface_hub import HfApi, _snapshot_download, constants, resolve_revision, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError
from huggingface_hub.utils import get_session, httpx

from vlmds.models.hub import commit_of, hub_cache, snapshot

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one repository, whose main branch is at COMMIT."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--name"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_snapshot_lies_where_vlmds_takes_it_from(cache):
    """hub.snapshot: file_download.repo_folder_name and "snapshots", read at the time of the call."""
    assert hub_cache() == cache
    folder = snapshot_download("owner/name", local_files_only=True, cache_dir=cache)
    assert folder == str(snapshot("owner/name", COMMIT)) and commit_of(snapshot("owner/name", COMMIT)) == COMMIT


def test_a_branch_is_resolved_to_a_commit_without_the_network(cache):
    """hub.cached_folder."""
    found = resolve_revision("owner/name", revision=None, local_files_only=True, cache_dir=cache)
    assert found.resolved == COMMIT
    with pytest.raises(RevisionResolutionError):
        resolve_revision("owner/other", revision=None, local_files_only=True, cache_dir=cache)


def test_errors_of_the_connection_are_of_the_httpx_that_the_hub_names():
    """hub_download._translated, artifact.py and export/publish.py catch huggingface_hub.utils.httpx.HTTPError, which
    need not be httpx's own."""
    assert issubclass(HfHubHTTPError, httpx.HTTPError)
    assert issubclass(httpx.TimeoutException, httpx.HTTPError) and isinstance(get_session(), httpx.Client)


def test_a_download_counts_its_bytes_in_a_bar_of_this_name():
    """hub_download._byte_counter: of snapshot_download's bars the one that begins with "Reconstruct" counts what is on
    disk."""
    source = inspect.getsource(_snapshot_download)
    assert 'desc="Reconstructing' in source and "cls=tqdm_class" in source


def test_a_model_is_asked_for_with_sizes_and_a_timeout():
    """hub_download.ask_hub."""
    assert {"revision", "files_metadata", "timeout"} <= set(inspect.signature(HfApi.model_info).parameters)
    assert constants.is_offline_mode() is True  # tests/conftest.py sets HF_HUB_OFFLINE
