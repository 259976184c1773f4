"""Which scope each method needs: the one table. A method that is missing here is denied, and a test finds it."""

from __future__ import annotations

from alto_common.rpc.authentication import Scope

ADMISSION_SERVICE = "alto.v1.AdmissionService"
REPORT_SERVICE = "alto.v1.ReportService"

_READ = (
    "GetTuningTask",
    "ListTuningTasks",
    "WatchTuningTask",
    "EstimateTuningTask",
    "ListTrials",
    "GetTrial",
    "ListTrialMetrics",
    "GetDatasetUpload",
    "GetDataset",
    "ListDatasets",
    "ListBaseModels",
    "DownloadAdapter",
)
_WRITE = (
    "CreateTuningTask",
    "CancelTuningTask",
    "PauseTuningTask",
    "ResumeTuningTask",
    "StopTrial",
    "UploadDataset",
    "DeleteDataset",
)

# Methods of the public port.
TENANT_SCOPES: dict[str, Scope] = {
    **{f"/{ADMISSION_SERVICE}/{name}": Scope.READ for name in _READ},
    **{f"/{ADMISSION_SERVICE}/{name}": Scope.WRITE for name in _WRITE},
}
# Methods of the internal port.
SERVICE_SCOPES: dict[str, Scope] = {f"/{REPORT_SERVICE}/ReportEvents": Scope.SERVICE}
