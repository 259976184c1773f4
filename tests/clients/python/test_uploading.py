import pytest
from alto.v1 import error_pb2
from alto_client import AltoError
from alto_client.uploading import upload_header
from alto_common.errors import DomainError

MIB = 1024 * 1024


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"".join(b'{"text": "%07d"}\n' % number for number in range(200_000)))
    return path


def test_a_file_goes_up_in_chunks_with_its_hash(client, admission, file):
    seen = []
    dataset = client.upload_dataset(file, on_progress=lambda done, total: seen.append((done, total)))
    assert dataset.size_bytes == file.stat().st_size
    assert dataset.display_name == "train.jsonl"
    assert seen[0] == (MIB, file.stat().st_size)
    assert seen[-1] == (file.stat().st_size, file.stat().st_size)


def test_an_upload_that_breaks_carries_on_where_the_server_is(client, admission, file):
    admission.break_uploads_after_chunks = [1, 0, 1]
    dataset = client.upload_dataset(file)
    assert dataset.size_bytes == file.stat().st_size
    assert len(admission.datasets) == 1


def test_the_same_file_again_is_the_same_dataset_and_is_not_sent(client, admission, file):
    first = client.upload_dataset(file)
    headers = sum(request.DESCRIPTOR.name == "DatasetUploadHeader" for request in admission.requests)
    assert client.upload_dataset(file).dataset_id == first.dataset_id
    assert sum(request.DESCRIPTOR.name == "DatasetUploadHeader" for request in admission.requests) == headers


def test_the_request_id_follows_from_content_and_names(tmp_path):
    one, copy, other = (tmp_path / name / "a.jsonl" for name in ("one", "copy", "other"))
    for path, text in ((one, "x"), (copy, "x"), (other, "y")):
        path.parent.mkdir()
        path.write_text(text)
    assert upload_header(one).request_id == upload_header(copy).request_id
    assert upload_header(one).request_id != upload_header(other).request_id
    assert upload_header(one).request_id != upload_header(one, "another name").request_id


def test_a_refused_file_is_refused_at_once_with_its_lines(client, admission, file):
    from alto_common.violations import Violation

    admission.error = DomainError(
        error_pb2.ERROR_REASON_DATASET_MALFORMED, "bad", violations=[Violation("line[3]", "{", "write JSON")]
    )
    with pytest.raises(AltoError) as caught:
        client.upload_dataset(file)
    assert caught.value.reason_name == "DATASET_MALFORMED"
    assert caught.value.violations[0].field == "line[3]"


def test_a_missing_file_is_an_os_error(client, tmp_path):
    with pytest.raises(FileNotFoundError):
        client.upload_dataset(tmp_path / "nothing.jsonl")
