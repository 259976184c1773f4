"""Settings of alto-node, read from ALTO_NODE_* variables; the defaults work on one machine."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import ClassVar, Literal

from alto_common.base_models import default_models_root
from alto_common.configuration import ServiceSettings, home_folder
from pydantic import Field

# It is not for workers.
SERVICE_TOKEN_VARIABLE = "ALTO_NODE_SERVICE_TOKEN"


class NodeSettings(ServiceSettings):
    """What the operator may choose. Durations are in seconds.

    `gpus` and `gpu_kind` left out are found out: the GPUs that the driver lists, else one place of kind "cpu"; more
    places of a CPU are as many worker ranks. `device` "auto" is "cuda" where there are GPUs. `strategy` says how a
    backbone lies on several places of one task; "auto" takes the fastest measured here of those that fit. `slots`,
    `tokens_per_tick` and `threads` left out are chosen by the executor (`threads` of a place: the CPUs shared out
    evenly). `model_folders` (separated by commas or the system's path separator) are further roots of which tasks may
    name folders by absolute path. A worker that is asked to stop has `stop_grace_s` to write its checkpoint before it
    is ended, and the node as long to tell admission the last of it, unless the task is finished: that waits for ever.
    What nobody used for `keep_s` in the work folder is deleted when the node starts, and once a day.
    """

    prefix: ClassVar[str] = "ALTO_NODE_"

    listen: str = "127.0.0.1:7413"
    node_id: str = Field(default_factory=socket.gethostname, min_length=1, max_length=128)
    placement_address: str = "127.0.0.1:7412"
    report_address: str = "127.0.0.1:7411"
    artifact_root: str = Field(default_factory=lambda: str(home_folder() / "artifacts"))
    work_root: Path = Field(default_factory=lambda: home_folder() / "node")
    models_root: Path = Field(default_factory=default_models_root)
    model_folders: str = ""
    allow_hub: bool = False
    gpus: int | None = Field(default=None, ge=1, le=64)
    gpu_kind: str = ""
    device: str = "auto"
    backbone_dtype: str = ""
    kernel_backend: str = "auto"
    strategy: Literal["auto", "replicated", "sharded"] = "auto"
    slots: int | None = Field(default=None, ge=1)
    tokens_per_tick: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    checkpoint_interval_s: float = Field(default=60.0, gt=0)
    stop_grace_s: float = Field(default=60.0, gt=0)
    shutdown_grace_s: float = Field(default=10.0, ge=0)
    keep_s: float = Field(default=7 * 86400.0, gt=0)

    @property
    def allowed_folders(self) -> tuple[Path, ...]:
        """The roots of `model_folders`."""
        parts = re.split(f"[,{re.escape(os.pathsep)}]", self.model_folders)
        return tuple(Path(part).expanduser() for part in parts if part)
