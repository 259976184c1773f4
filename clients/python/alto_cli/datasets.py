"""What the commands about uploaded datasets do."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path

from alto.v1 import dataset_pb2
from google.protobuf import timestamp_pb2

from alto_cli.connection import connect
from alto_cli.options import Target
from alto_cli.output import print_json, print_message, print_table, say
from alto_cli.transfers import transfer
from alto_cli.view.wording import bytes_text, plural
from alto_cli.wire_json import as_json, enum_word


def list_datasets(target: Target, json_output: bool) -> None:
    """List the datasets, newest first."""
    with connect(target) as client:
        found = list(client.datasets())
        usage = client.dataset_usage()
    if json_output:
        print_json({"datasets": [as_json(dataset) for dataset in found], "usage": as_json(usage)})
        return
    rows = [
        [
            dataset.dataset_id,
            dataset.display_name,
            _format(dataset),
            f"{dataset.row_count:,}",
            bytes_text(dataset.size_bytes),
            _local_time(dataset.create_time),
        ]
        for dataset in found
    ]
    print_table(["dataset", "name", "format", "rows", "size", "uploaded"], rows, empty="no datasets")
    for upload in usage.unfinished_uploads:
        since = _local_time(upload.update_time)
        say(
            f"unfinished since {since}, taking {bytes_text(upload.size_bytes)}: upload the file again, or give it up: "
            f"alto dataset delete {upload.dataset_id}"
        )
    if usage.quota_bytes:
        say(f"{bytes_text(usage.used_bytes)} of {bytes_text(usage.quota_bytes)} used")


def upload(path: Path, name: str, target: Target, json_output: bool) -> None:
    """Upload a file."""
    with connect(target) as client, transfer(f"uploading {path.name}") as progress:
        dataset = client.upload_dataset(path, display_name=name, on_progress=progress)
    if json_output:
        print_message(dataset)
        return
    print(dataset.dataset_id)
    duplicates = f", {plural(dataset.duplicate_count, 'duplicate')}" if dataset.duplicate_count else ""
    say(f"{plural(dataset.row_count, 'row')} of {_format(dataset)}, {bytes_text(dataset.size_bytes)}{duplicates}")


def delete(dataset_id: str, target: Target, json_output: bool) -> None:
    """Delete a dataset."""
    with connect(target) as client:
        client.delete_dataset(dataset_id)
    if json_output:
        print_json({"deleted": dataset_id})
    else:
        say(f"{dataset_id} is deleted")


def _local_time(time: timestamp_pb2.Timestamp) -> str:
    return time.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def _format(dataset: dataset_pb2.Dataset) -> str:
    return enum_word(dataset_pb2.DatasetFormat.DESCRIPTOR, dataset.format).lower()
