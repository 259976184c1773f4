"""The Python SDK of ALTO: admit tuning tasks, follow them, and fetch their adapters.

    with AltoClient("127.0.0.1:7410", api_key) as client:
        result = client.tune(load_task_file("gsm8k.yaml"))
        print(result.best_validation_loss, result.adapter_folder)

`alto_client.client` is the place to begin; each hard part has a file of its own: `watching`, `uploading`,
`downloading`, `errors`, `task_file`.
"""

from alto_client.client import AltoClient
from alto_client.downloading import DownloadedAdapter
from alto_client.errors import AltoError, FieldViolation
from alto_client.operator import OperatorClient
from alto_client.task_file import TaskFile, TaskFileError, load_task_file
from alto_client.tuning import TuneResult

__all__ = [
    "AltoClient",
    "AltoError",
    "DownloadedAdapter",
    "FieldViolation",
    "OperatorClient",
    "TaskFile",
    "TaskFileError",
    "TuneResult",
    "load_task_file",
]
