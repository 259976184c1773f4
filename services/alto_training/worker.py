"""The process of one assignment: `python -m alto_training.worker FOLDER`. Runs the executor, writes the journal.

It ends with status 0 when its journal's last event says how the task stands; any other end is a crash, and the task is
worth another attempt. It never outlives its node: the kernel ends it with its parent. Guests may join it meanwhile,
each with a folder and a journal of its own; they leave when its own task does.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import sys
from pathlib import Path

import structlog
from alto.v1 import event_pb2
from alto_common.base_models import UnknownModelError
from alto_common.logs import configure_logs
from alto_common.tuning import TuningJob

from alto_training.executor import events
from alto_training.executor.errors import CheckpointError
from alto_training.executor.settings import BackboneDtype, ExecutorSettings
from alto_training.executor.settings import Backend as KernelBackend
from alto_training.folders import TOKENS_FOLDER
from alto_training.outages import StoreUnreachableError
from alto_training.parent_process import die_with
from alto_training.worker_order import MODEL_MISSING_STATUS, STORE_UNREACHABLE_STATUS, WorkerOrder
from alto_training.worker_task import TaskLockedError, WorkerTask, is_untrainable
from alto_training.worker_tasks import WorkerTasks

log = structlog.get_logger("alto.worker")


def main() -> None:
    """Run the assignment in the folder that the command line names."""
    # Whoever ends a service may tell all of its processes at once: it is the node that asks for a checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folder = Path(sys.argv[1])
    order = WorkerOrder.read(folder)
    die_with(order.node_process_id)
    configure_logs()
    task = WorkerTask.open(folder, order)
    try:
        task.take_lock()
        task.end(_train(task, order))
    except TaskLockedError as error:
        sys.exit(str(error))
    except StoreUnreachableError as error:
        log.error(str(error), cause=repr(error.__cause__))
        sys.exit(STORE_UNREACHABLE_STATUS)
    except UnknownModelError as error:
        log.error(str(error))
        sys.exit(MODEL_MISSING_STATUS)
    finally:
        if not task.is_closed:
            task.close()


def _train(task: WorkerTask, order: WorkerOrder) -> event_pb2.TaskEvent:
    """Train, and return the event that tells how the task stands. Errors that another attempt may not have pass."""
    try:
        return task.ended(_run(task.prepare(), task, order))
    except Exception as error:
        if not is_untrainable(error):
            raise
        log.exception("the task cannot be trained")
        return task.failed(error)


def _executor_settings(order: WorkerOrder) -> ExecutorSettings:
    default = BackboneDtype.BFLOAT16 if order.device.startswith("cuda") else BackboneDtype.FLOAT32
    return ExecutorSettings(
        device=order.device,
        backbone_dtype=BackboneDtype(order.backbone_dtype) if order.backbone_dtype else default,
        backend=KernelBackend(order.kernel_backend),
        slots=order.slots,
        tokens_per_tick=order.tokens_per_tick,
        threads=order.threads,
        checkpoint_interval_s=order.checkpoint_interval_s,
        cache_dir=_token_cache(order),
    )


def _token_cache(order: WorkerOrder) -> Path:
    return Path(order.dataset_cache) / TOKENS_FOLDER


def _run(job: TuningJob, task: WorkerTask, order: WorkerOrder) -> events.Outcome:
    # Imported here: a command that comes while torch is being loaded is not lost, and a bad order costs nothing.
    from alto_training.sharding.automatic import train
    from alto_training.sharding.strategy import Strategy, StrategyRecords

    workdir = task.workdir
    settings, records = _executor_settings(order), StrategyRecords(Path(order.strategy_records))
    strategy = Strategy(order.strategy) if order.strategy else None
    tasks = WorkerTasks(task, _token_cache(order))
    assert task.lock is not None, "a worker has its task's lock"
    # Ranks inherit the lock: it lasts until the last of them is gone.
    keep_open = [task.lock.fileno()]

    def attempt() -> events.Outcome:
        return train(job, workdir, tasks.take, settings, tasks, order.places, records, strategy, keep_open)

    try:
        return attempt()
    except CheckpointError:
        # Every generation is damaged. Nothing can carry on from it, so begin again; what is damaged is kept to look at.
        log.exception("the checkpoints are damaged; starting over")
        shutil.move(workdir, workdir.with_name(f"{workdir.name}.damaged-{secrets.token_hex(4)}"))
        return attempt()


if __name__ == "__main__":
    main()
