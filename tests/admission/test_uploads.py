"""Uploading over real sockets: kept over a break, checked line by line, limited."""

import asyncio
import hashlib
import json
import os
import time
from contextlib import suppress

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import dataset_pb2
from alto_admission.server import clock_us
from alto_common.rpc.status import reason_in
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from .conftest import ROWS, upload_messages


def header_of(content=ROWS, **fields):
    values = {
        "request_id": "upload-1",
        "file_name": "rows.jsonl",
        "size_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    return values | fields


async def send(client, header, content, offset=0):
    messages_ = upload_messages(header, content, offset)
    return (await client.stub.UploadDataset(messages_, metadata=client.metadata, timeout=20)).dataset


async def failure(awaitable):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


def detail(error, kind):
    found = kind()
    assert any(one.Unpack(found) for one in rpc_status.from_call(error).details)
    return found


async def test_an_uploaded_file_becomes_a_dataset(admission, tmp_path):
    client = await admission.client()
    content = ROWS + ROWS[:100].splitlines(keepends=True)[0]
    dataset = await client.upload(content, display_name="questions")
    assert (dataset.display_name, dataset.format) == ("questions", dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION)
    assert (dataset.row_count, dataset.duplicate_count, dataset.size_bytes) == (21, 1, len(content))
    (kept,) = (tmp_path / "artifacts").rglob("rows.jsonl")
    assert kept.read_bytes() == content
    assert not list((tmp_path / "uploads").iterdir())
    listed = await client.call("ListDatasets", messages.ListDatasetsRequest())
    assert list(listed.datasets) == [dataset]


async def test_an_upload_carries_on_after_a_break(admission):
    client = await admission.client()
    header = header_of()
    call = client.stub.UploadDataset(metadata=client.metadata)
    begun = list(upload_messages(header, ROWS))[:4]
    for message in begun:
        await call.write(message)
    status = messages.GetDatasetUploadRequest(request_id="upload-1")
    missing = messages.GetDatasetUploadRequest(request_id="upload-2")
    assert reason_in(await failure(client.call("GetDatasetUpload", missing))) == "RESOURCE_NOT_FOUND"
    committed = 0
    while committed < 300:
        await asyncio.sleep(0.02)
        with suppress(grpc.aio.AioRpcError):
            committed = (await client.call("GetDatasetUpload", status)).committed_bytes
    call.cancel()
    wrong = await failure(send(client, header, ROWS, committed + 1))
    assert reason_in(wrong) == "OFFSET_MISMATCH"
    assert detail(wrong, error_details_pb2.ErrorInfo).metadata["committed_bytes"] == str(committed)
    dataset = await send(client, header, ROWS, committed)
    assert dataset.row_count == 20
    assert await send(client, header, ROWS) == dataset, "the same request_id returns its dataset"
    kept = await client.call("GetDatasetUpload", status)
    assert (kept.committed_bytes, kept.dataset) == (len(ROWS), dataset)


async def test_a_request_id_with_another_header_is_refused(admission):
    client = await admission.client()
    await send(client, header_of(), ROWS)
    error = await failure(send(client, header_of(display_name="other"), ROWS))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


async def test_wrong_bytes_are_refused_and_forgotten(admission):
    client = await admission.client()
    error = await failure(send(client, header_of(sha256="0" * 64), ROWS))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.DATA_LOSS, "CONTENT_MISMATCH")
    assert (await send(client, header_of(), ROWS)).row_count == 20


@pytest.mark.parametrize("size", [len(ROWS) - 1, len(ROWS) + 1])
async def test_more_or_fewer_bytes_than_announced(admission, size):
    client = await admission.client()
    error = await failure(send(client, header_of(size_bytes=size), ROWS))
    assert reason_in(error) == "CONTENT_MISMATCH"


async def test_a_malformed_line_is_named(admission):
    client = await admission.client()
    content = b'{"text": "a"}\n{"text": 1}\n{"text": "b"\n'
    error = await failure(client.upload(content, file_name="train.jsonl"))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "DATASET_MALFORMED")
    found = detail(error, error_details_pb2.BadRequest).field_violations
    assert [one.field for one in found] == ["line[2].text", "line[3]"]
    assert "give a string" in found[0].description
    assert error.details().startswith("train.jsonl: line[2].text = '1': give a string")
    assert detail(error, error_details_pb2.ErrorInfo).metadata["file_name"] == "train.jsonl"


async def test_a_damaged_parquet_file_is_told_of_under_the_name_it_was_sent_with(admission):
    client = await admission.client()
    error = await failure(client.upload(b"PAR1 and nothing that follows PAR1", file_name="rows.parquet"))
    assert reason_in(error) == "DATASET_MALFORMED"
    (found,) = detail(error, error_details_pb2.BadRequest).field_violations
    assert found.description.startswith("line[1] = 'rows.parquet': write the Parquet file again")


@pytest.mark.parametrize(
    ("limits", "field"), [({"max_dataset_bytes": 100}, "header.size_bytes"), ({"max_dataset_rows": 5}, "dataset")]
)
async def test_what_is_over_a_limit_is_refused(started, limits, field):
    admission = await started(**limits)
    client = await admission.client()
    error = await failure(client.upload())
    assert reason_in(error) == "DATASET_TOO_LARGE"
    assert detail(error, error_details_pb2.BadRequest).field_violations[0].field == field
    assert "rows.jsonl: " in error.details()


async def test_datasets_take_of_a_quota_until_they_are_deleted(started):
    admission = await started(max_stored_dataset_bytes=len(ROWS) + 10)
    client, other = await admission.client(), await admission.client("other")
    dataset = await client.upload()
    usage = (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage
    assert (usage.used_bytes, usage.quota_bytes) == (len(ROWS), len(ROWS) + 10)
    small = b'{"text": "a b c"}'
    error = await failure(client.upload(small, request_id="small"))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")
    assert detail(error, error_details_pb2.BadRequest).field_violations[0].field == "header.size_bytes"
    assert "delete datasets that no task needs, or unfinished uploads" in error.details()
    (quota,) = detail(error, error_details_pb2.QuotaFailure).violations
    assert (quota.subject, quota.description) == ("tenant:acme", f"{len(ROWS) + 10:,} bytes of datasets")
    await other.upload(small)
    await client.call("DeleteDataset", messages.DeleteDatasetRequest(dataset_id=dataset.dataset_id))
    await client.upload(small, request_id="small")


async def test_an_unfinished_upload_is_listed_and_can_be_given_up(started, tmp_path):
    admission = await started(max_stored_dataset_bytes=len(ROWS) + 10)
    client, other = await admission.client(), await admission.client("other")
    # Its header alone.
    assert reason_in(await failure(send(client, header_of(), b""))) == "CONTENT_MISMATCH"
    assert reason_in(await failure(client.upload(request_id="upload-2"))) == "QUOTA_EXCEEDED"
    (upload,) = (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage.unfinished_uploads
    assert (upload.request_id, upload.size_bytes) == ("upload-1", len(ROWS))
    assert abs(upload.update_time.ToMicroseconds() - clock_us()) < 60_000_000
    kept = await client.call("GetDatasetUpload", messages.GetDatasetUploadRequest(request_id="upload-1"))
    assert (kept.committed_bytes, kept.dataset_id) == (0, upload.dataset_id)
    given_up = messages.DeleteDatasetRequest(dataset_id=upload.dataset_id)
    assert reason_in(await failure(other.call("DeleteDataset", given_up))) == "RESOURCE_NOT_FOUND"
    await client.call("DeleteDataset", given_up)
    usage = (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage
    assert (usage.used_bytes, list(usage.unfinished_uploads)) == (0, [])
    assert reason_in(await failure(client.call("DeleteDataset", given_up))) == "RESOURCE_NOT_FOUND"
    dataset = await client.upload(request_id="upload-2")
    assert dataset.dataset_id != upload.dataset_id
    assert not (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage.unfinished_uploads


@pytest.mark.parametrize("rest", ["chunk", "end"])
async def test_nothing_is_kept_of_an_upload_that_is_given_up_while_it_comes(admission, tmp_path, rest):
    client = await admission.client()
    header, *chunks = upload_messages(header_of(), ROWS)
    call = client.stub.UploadDataset(metadata=client.metadata, timeout=20)
    for message in (header, chunks[0]):
        await call.write(message)
    while not [path for path in (tmp_path / "uploads").iterdir() if path.stat().st_size == 100]:
        await asyncio.sleep(0.02)
    (upload,) = (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage.unfinished_uploads
    await client.call("DeleteDataset", messages.DeleteDatasetRequest(dataset_id=upload.dataset_id))
    assert not list((tmp_path / "uploads").iterdir())
    # One message: at the second, grpc.aio may put an error of its own for what the server says (grpc/grpc#36066).
    await (call.write(chunks[1]) if rest == "chunk" else call.done_writing())
    error = await failure(call)
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert not list((tmp_path / "uploads").iterdir())
    assert not admission.server._uploads._streams
    assert (await send(client, header_of(), ROWS)).dataset_id != upload.dataset_id


async def test_an_upload_that_is_given_up_while_its_end_is_judged_leaves_nothing(admission, monkeypatch, tmp_path):
    client = await admission.client()
    uploads = admission.server._uploads
    keep, reached, deleted = uploads._keep, asyncio.Event(), asyncio.Event()

    async def keep_later(*arguments):
        reached.set()
        await deleted.wait()
        return await keep(*arguments)

    monkeypatch.setattr(uploads, "_keep", keep_later)
    sending = asyncio.create_task(failure(send(client, header_of(), ROWS)))
    await reached.wait()
    (upload,) = (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage.unfinished_uploads
    given_up = messages.DeleteDatasetRequest(dataset_id=upload.dataset_id)
    deleting = asyncio.create_task(client.call("DeleteDataset", given_up))
    while (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage.unfinished_uploads:
        await asyncio.sleep(0.02)
    deleted.set()
    await deleting
    assert reason_in(await sending) == "UNAVAILABLE"
    assert not list((tmp_path / "artifacts").rglob("rows.jsonl"))
    assert not list((tmp_path / "uploads").iterdir())


async def test_an_abandoned_upload_is_removed_with_what_it_takes_of_the_quota(admission, tmp_path):
    client = await admission.client()
    uploads = admission.server._uploads
    for request_id in ("abandoned", "carried-on"):
        header = header_of(request_id=request_id)
        error = await failure(send(client, header, ROWS[:200]))
        assert reason_in(error) == "CONTENT_MISMATCH"
    week_s = 7 * 24 * 3600
    old, young = sorted((tmp_path / "uploads").iterdir(), key=lambda path: path.stat().st_mtime)
    os.utime(old, (time.time() - week_s - 60,) * 2)
    of_a_killed_process = tmp_path / "artifacts" / "tenants" / "acme" / "datasets" / old.stem / "rows.jsonl"
    of_a_killed_process.parent.mkdir(parents=True)
    of_a_killed_process.write_bytes(ROWS)
    uploads._clock_us = lambda: clock_us() + (week_s + 60) * 1_000_000
    await uploads.remove_abandoned()
    assert list((tmp_path / "uploads").iterdir()) == [young]
    assert not of_a_killed_process.exists()
    usage = (await client.call("ListDatasets", messages.ListDatasetsRequest())).usage
    assert usage.used_bytes == len(ROWS)


async def test_an_upload_that_was_removed_while_it_ended_is_sent_again(admission, monkeypatch, tmp_path):
    client = await admission.client()
    uploads = admission.server._uploads
    keep = uploads._keep

    async def removed_first(upload, *rest):
        assert await uploads._store.forget_upload(upload)
        return await keep(upload, *rest)

    monkeypatch.setattr(uploads, "_keep", removed_first)
    error = await failure(send(client, header_of(), ROWS))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")
    assert not list((tmp_path / "artifacts").rglob("rows.jsonl"))
    assert not list((tmp_path / "uploads").iterdir())
    monkeypatch.setattr(uploads, "_keep", keep)
    dataset = await send(client, header_of(), ROWS)
    assert await send(client, header_of(), ROWS) == dataset


async def test_nothing_is_kept_of_what_comes_after_an_upload_was_found_damaged(admission, tmp_path):
    client = await admission.client()
    header, *chunks = upload_messages(header_of(sha256="0" * 64), ROWS)
    first, second = (client.stub.UploadDataset(metadata=client.metadata, timeout=20) for _ in range(2))
    for message in (header, *chunks):
        await first.write(message)
    while sum(path.stat().st_size for path in (tmp_path / "uploads").iterdir()) < len(ROWS):
        await asyncio.sleep(0.02)
    (stream,) = admission.server._uploads._streams.values()
    owner = stream.owner
    await second.write(header)
    while stream.owner is owner:
        await asyncio.sleep(0.02)
    await first.done_writing()
    assert reason_in(await failure(first)) == "CONTENT_MISMATCH"
    await second.write(chunks[0])
    assert reason_in(await failure(second)) == "UNAVAILABLE"
    assert not list((tmp_path / "uploads").iterdir())
    assert not admission.server._uploads._streams


async def test_what_is_no_upload_is_refused(admission):
    client = await admission.client()
    chunk = messages.UploadDatasetRequest(chunk=messages.DatasetChunk(data=b"a"))
    for sent in ([], [chunk], [*upload_messages(header_of(), b""), *upload_messages(header_of(), b"")]):
        error = await failure(client.stub.UploadDataset(iter(sent), metadata=client.metadata))
        assert reason_in(error) == "INVALID_FIELD"
    error = await failure(client.upload(file_name="rows.csv"))
    assert reason_in(error) == "INVALID_FIELD"
    assert (await client.upload(file_name="ROWS.JSONL")).display_name == "ROWS.JSONL"


async def test_a_dataset_is_deleted_once_no_task_needs_it(admission, placement, tmp_path):
    client = await admission.client()
    task = await client.create()
    request = messages.DeleteDatasetRequest(dataset_id=task.spec.dataset_id)
    error = await failure(client.call("DeleteDataset", request))
    assert (error.code(), reason_in(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "DATASET_IN_USE")
    await client.call("CancelTuningTask", messages.CancelTuningTaskRequest(task_id=task.task_id))
    await client.call("DeleteDataset", request)
    assert not list((tmp_path / "artifacts").rglob("rows.jsonl"))
    assert reason_in(await failure(client.call("DeleteDataset", request))) == "RESOURCE_NOT_FOUND"


async def test_other_formats_are_known(admission):
    client = await admission.client()
    for row, wanted in (
        ({"text": "a"}, dataset_pb2.DATASET_FORMAT_TEXT),
        ({"messages": [{"role": "assistant", "content": "a"}]}, dataset_pb2.DATASET_FORMAT_MESSAGES),
        ({"instruction": "a", "output": "b"}, dataset_pb2.DATASET_FORMAT_ALPACA),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, dataset_pb2.DATASET_FORMAT_PREFERENCE),
    ):
        assert (await client.upload(json.dumps(row).encode())).format == wanted
