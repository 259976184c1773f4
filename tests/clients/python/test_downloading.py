import os

import pytest
from alto_client import AltoError


@pytest.fixture
def files(admission):
    admission.adapter_files = {
        "adapter_config.json": b'{"r": 8}',
        "empty.txt": b"",
        "adapter_model.safetensors": os.urandom(12_345),
    }
    return admission.adapter_files


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_arrive_whole_and_nothing_else_is_left(client, files, tmp_path):
    downloaded = client.download_adapter("task-1", tmp_path / "out")
    assert content(tmp_path / "out") == files
    assert downloaded.trial_id == "trial-002"
    assert downloaded.adapter.validation_loss == 1.25


def test_a_download_that_breaks_carries_on(client, admission, files, tmp_path):
    admission.break_downloads_after_chunks = [None, 0, None, 3, None, 1]
    client.download_adapter("task-1", tmp_path)
    assert content(tmp_path) == files
    offsets = [request.offset for request in admission.requests]
    assert 3000 in offsets
    assert 4000 in offsets


def test_another_process_carries_on_from_what_was_left(client, admission, files, tmp_path):
    admission.break_downloads_after_chunks = [None, 5, *[0] * 100]
    with pytest.raises(AltoError):
        from alto_client.downloading import Download

        Download(client._connection, client._stub, "task-1", tmp_path, patience_s=0).run()
    assert sorted(content(tmp_path)) == sorted(name for name in content(tmp_path) if name.endswith(".part"))
    admission.break_downloads_after_chunks = []
    admission.requests.clear()
    client.download_adapter("task-1", tmp_path)
    assert content(tmp_path) == files
    assert [request.offset for request in admission.requests] == [0, 5000]


def test_what_is_there_already_is_not_fetched_again(client, admission, files, tmp_path):
    client.download_adapter("task-1", tmp_path)
    admission.requests.clear()
    client.download_adapter("task-1", tmp_path)
    assert len(admission.requests) == 1
    (tmp_path / "adapter_config.json").unlink()
    client.download_adapter("task-1", tmp_path)
    assert content(tmp_path) == files


def test_a_damaged_file_is_fetched_once_more(client, admission, files, tmp_path):
    # The first request of an attempt reads the list alone, so that two are damaged in one attempt.
    admission.corrupt_downloads = 2
    client.download_adapter("task-1", tmp_path)
    assert content(tmp_path) == files


def test_a_file_damaged_for_good_is_an_error_and_keeps_what_was_there(client, admission, files, tmp_path):
    admission.corrupt_downloads = 100
    (tmp_path / "adapter_config.json").write_text("the old one")
    with pytest.raises(AltoError, match="SHA-256") as caught:
        client.download_adapter("task-1", tmp_path, replace=True)
    assert caught.value.reason_name == "CONTENT_MISMATCH"
    assert content(tmp_path)["adapter_config.json"] == b"the old one"


def test_another_adapter_is_replaced_only_when_that_is_said(client, admission, files, tmp_path):
    client.download_adapter("task-1", tmp_path)
    before = content(tmp_path)
    admission.adapter_files = {**files, "adapter_model.safetensors": b"of another trial"}
    with pytest.raises(AltoError, match="--force") as caught:
        client.download_adapter("task-1", tmp_path, "trial-003")
    assert caught.value.reason_name == "STATE_CONFLICT"
    assert content(tmp_path) == before
    client.download_adapter("task-1", tmp_path, "trial-003", replace=True)
    assert content(tmp_path) == admission.adapter_files


def test_a_better_adapter_that_appears_meanwhile_is_fetched_from_its_beginning(client, admission, files, tmp_path):
    original = client._stub.DownloadAdapter
    calls = []

    def download(request, **options):
        calls.append(request.offset)
        if len(calls) == 2:
            admission.adapter_files = {**files, "adapter_model.safetensors": b"better"}
        return original(request, **options)

    client._stub.DownloadAdapter = download
    client.download_adapter("task-1", tmp_path)
    assert content(tmp_path)["adapter_model.safetensors"] == b"better"


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", ".bashrc", "a/b", ""])
def test_a_name_that_leaves_the_folder_is_refused(client, admission, tmp_path, name):
    admission.adapter_files = {name: b"x"}
    with pytest.raises(AltoError, match="named a file"):
        client.download_adapter("task-1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
