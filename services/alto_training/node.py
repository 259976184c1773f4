"""The node: takes up what placement assigns, supervises one worker for each, and keeps the lease.

Runs no training itself and imports no torch, so that nothing keeps it from its heartbeats.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc
import structlog
from alto.v1 import error_pb2, placement_pb2, placement_service_pb2, report_service_pb2_grpc
from alto_common.errors import reason_name
from alto_common.rpc.channel import bearer_metadata

from alto_training.assignments import Assignments, Ending, EndKind, Held, StopReason
from alto_training.contact import Contact
from alto_training.devices import Devices
from alto_training.folders import STRATEGIES_FILE, AssignmentFolders, sweep
from alto_training.reporter import Reporter
from alto_training.settings import NodeSettings
from alto_training.sharding.places import Places
from alto_training.supervisor import Supervisor
from alto_training.worker_order import WorkerOrder

LEASE_CHECK_S = 0.1
# File systems may note once a day that a file is read.
READING_NOTED_S = 86400.0

_STOP_REASONS: dict[int, StopReason] = {
    placement_pb2.STOP_REASON_CANCELLED: StopReason.CANCELLED,
    placement_pb2.STOP_REASON_PAUSED: StopReason.PAUSED,
    placement_pb2.STOP_REASON_DRAINED: StopReason.DRAINED,
    placement_pb2.STOP_REASON_PREEMPTED: StopReason.PREEMPTED,
    placement_pb2.STOP_REASON_SUPERSEDED: StopReason.SUPERSEDED,
}

log = structlog.get_logger("alto.node")


class TrainingNode:
    """What this host trains. `changed` is set when placement should hear something before the next heartbeat."""

    def __init__(
        self,
        settings: NodeSettings,
        devices: Devices,
        reports: grpc.aio.Channel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.assignments = Assignments()
        self.supervisors: dict[str, Supervisor] = {}
        self.changed = asyncio.Event()
        self.clock = clock
        self._settings = settings
        self._devices = devices
        self._reports = report_service_pb2_grpc.ReportServiceStub(reports)
        self._admission = Contact("admission")
        self._runs: dict[str, asyncio.Task[None]] = {}

    def obey(self, message: placement_service_pb2.NodeSessionResponse) -> None:
        """Carry out one message of placement."""
        match message.WhichOneof("message"):
            case "lease_renewed":
                lease = message.lease_renewed.lease_duration
                self.assignments.renewed(lease.seconds + lease.nanos / 1e9)
            case "assignment":
                self._begin(message.assignment)
            case "assignment_stop":
                stop = message.assignment_stop
                self._stop(stop.assignment_id, _STOP_REASONS.get(stop.reason, StopReason.PREEMPTED))
            case "trials_stop":
                supervisor = self.supervisors.get(message.trials_stop.assignment_id)
                if supervisor is not None:
                    supervisor.stop_trials(tuple(message.trials_stop.trial_ids))

    async def keep_lease(self) -> None:
        """Stop everything before the lease has run out, and end it then: somebody else may train it from then on."""
        while True:
            now_s = self.clock()
            for held in self.assignments.near_lease_end(now_s):
                self._give_up(
                    held, StopReason.LEASE_ENDS, "placement is silent: a checkpoint before the lease runs out"
                )
            for held in self.assignments.without_lease(now_s):
                self._give_up(held, StopReason.LEASE_LOST, "the lease has run out: ending the worker")
            await asyncio.sleep(LEASE_CHECK_S)

    def _give_up(self, held: Held, reason: StopReason, why: str) -> None:
        supervisor = self.supervisors.get(held.assignment_id)
        if supervisor is not None and not supervisor.worker_gone.is_set() and supervisor.stop(reason):
            log.warning(why, task_id=held.task_id, epoch=held.epoch)

    def sweep(self) -> None:
        """Delete what nobody has used for long in the work folder, and nothing that an attempt may be using."""
        running_since_s = [supervisor.begun_s - READING_NOTED_S for supervisor in list(self.supervisors.values())]
        try:
            sweep(self._settings.work_root, min([time.time() - self._settings.keep_s, *running_since_s]))
        except OSError as error:
            log.warning("the work folder could not be swept", error=str(error))

    def leave(self, reason: StopReason) -> None:
        """Stop everything, take up no more, and tell placement."""
        self.assignments.leaving = True
        for supervisor in self.supervisors.values():
            supervisor.stop(reason)
        self.changed.set()

    async def close(self) -> None:
        """End every worker at once and wait until they are gone."""
        self.leave(StopReason.SUPERSEDED)
        for run in list(self._runs.values()):
            with suppress(asyncio.CancelledError):
                await run

    def _begin(self, assignment: placement_pb2.Assignment) -> None:
        held = self.assignments.offer(
            assignment.assignment_id,
            assignment.work.task_id,
            assignment.epoch,
            tuple(assignment.gpu_indices),
            self.clock(),
            assignment.host_assignment_id,
        )
        if held is None:
            return
        host = self.supervisors.get(held.host_assignment_id)
        if held.host_assignment_id and (host is None or not host.takes_guests):
            # It has ended meanwhile: the guest waits for another place.
            self.assignments.end(held.assignment_id, Ending(EndKind.STOPPED))
            self.changed.set()
            return
        of = host.held.task_id if host is not None else None
        log.info("assignment taken up", task_id=held.task_id, epoch=held.epoch, gpus=held.gpu_indices, guest_of=of)
        before = [self._runs[held_before.assignment_id] for held_before in self._same_task(held)]
        for outdated in self.assignments.outdated_by(held):
            self._stop(outdated.assignment_id, StopReason.SUPERSEDED)
        try:
            folders = AssignmentFolders(self._settings.work_root, held.task_id, held.epoch)
        except ValueError as error:
            reason = reason_name(error_pb2.ERROR_REASON_INVALID_FIELD)
            self.assignments.end(held.assignment_id, Ending(EndKind.FAILED, reason, str(error)))
            return
        supervisor = Supervisor(
            held,
            assignment.work,
            self._order(held, folders, tuple(assignment.stopped_trial_ids)),
            folders,
            self._environment(held),
            self._reporter,
            self._settings.stop_grace_s,
            host,
        )
        self.supervisors[held.assignment_id] = supervisor
        self._runs[held.assignment_id] = asyncio.create_task(self._run(supervisor, before))
        self.changed.set()

    def _same_task(self, held: Held) -> list[Held]:
        return [
            other.held
            for other in self.supervisors.values()
            if other.held.task_id == held.task_id and other.held.assignment_id != held.assignment_id
        ]

    def _stop(self, assignment_id: str, reason: StopReason) -> None:
        supervisor = self.supervisors.get(assignment_id)
        if supervisor is not None:
            supervisor.stop(reason)
        elif reason is StopReason.SUPERSEDED:
            # Over already, and placement does not want to hear of it.
            self.assignments.drop(assignment_id)

    async def _run(self, supervisor: Supervisor, before: list[asyncio.Task[None]]) -> None:
        held = supervisor.held
        if before:
            await asyncio.wait(before)
        try:
            ending = await supervisor.run()
        except Exception:
            log.exception("an assignment could not be supervised", task_id=held.task_id, epoch=held.epoch)
            ending = supervisor.internal_error()
        finally:
            del self.supervisors[held.assignment_id]
            del self._runs[held.assignment_id]
        if ending is None:
            self.assignments.drop(held.assignment_id)
        else:
            failure = {"reason": ending.reason, "why": ending.message} if ending.reason else {}
            log.info("assignment ended", task_id=held.task_id, epoch=held.epoch, outcome=ending.kind.value, **failure)
            self.assignments.end(held.assignment_id, ending)
            if ending.kind in (EndKind.COMPLETED, EndKind.FAILED) or supervisor.is_cancelled:
                folders = AssignmentFolders(self._settings.work_root, held.task_id, held.epoch)
                await asyncio.to_thread(folders.remove_training_state)
        self.changed.set()

    def _reporter(self, folder: Path, task_id: str, epoch: int) -> Reporter:
        metadata = bearer_metadata(self._settings.service_token)
        return Reporter(self._reports, self._admission, metadata, folder, task_id, epoch)

    def _environment(self, held: Held) -> dict[str, str]:
        environment = dict(os.environ)
        # OpenMP's threads spin while they wait and take the core from whoever else wants it; an operator may want that.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if self._devices.has_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._places(held).devices)
            # CUDA counts the fastest first unless it is told to count as the driver does.
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        return environment

    def _places(self, held: Held) -> Places:
        devices = self._devices
        chosen = tuple(devices.indices[index] for index in held.gpu_indices) if devices.has_gpus else ()
        return Places(len(held.gpu_indices), devices.kind, devices.memory_bytes_per_place, chosen)

    def _order(self, held: Held, folders: AssignmentFolders, stopped_trial_ids: tuple[str, ...]) -> WorkerOrder:
        settings = self._settings
        device = settings.device
        if device == "auto":
            device = "cuda" if self._devices.has_gpus else "cpu"
        threads_of_a_place = max(1, (os.cpu_count() or 1) // self._devices.places)
        return WorkerOrder(
            node_id=settings.node_id,
            node_process_id=os.getpid(),
            epoch=held.epoch,
            task_folder=str(folders.task),
            artifact_root=settings.artifact_root,
            dataset_cache=str(folders.dataset_cache),
            models_root=str(settings.models_root),
            model_folders=tuple(str(folder) for folder in settings.allowed_folders),
            allow_hub=settings.allow_hub,
            device=device,
            places=self._places(held),
            strategy="" if settings.strategy == "auto" else settings.strategy,
            strategy_records=str(settings.work_root / STRATEGIES_FILE),
            backbone_dtype=settings.backbone_dtype,
            kernel_backend=settings.kernel_backend,
            slots=settings.slots,
            tokens_per_tick=settings.tokens_per_tick,
            threads=settings.threads or threads_of_a_place,
            checkpoint_interval_s=settings.checkpoint_interval_s,
            stopped_trial_ids=stopped_trial_ids,
        )
