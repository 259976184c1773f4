"""Why a task is where it is, in words for who owns it: what it waits for, when it starts and ends, what would help."""

from __future__ import annotations

from datetime import UTC, datetime

from alto.v1 import tuning_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from alto_cli.view.wording import duration_text, loss_text, percent_text, plural

QUEUED = tuning_pb2.TASK_STATE_QUEUED
RUNNING = tuning_pb2.TASK_STATE_RUNNING
STOPS = {
    tuning_pb2.TASK_STATE_PAUSING: "is writing a checkpoint, then it is paused as you asked",
    tuning_pb2.TASK_STATE_CANCELLING: "is being cancelled as you asked",
}
ENDS = {
    tuning_pb2.TASK_STATE_SUCCEEDED: "has succeeded",
    tuning_pb2.TASK_STATE_FAILED: "has failed",
    tuning_pb2.TASK_STATE_CANCELLED: "was cancelled",
}
MOST_NAMED = 3
# A span of the end is worth telling when it is wider than this share of what is left.
WORTH_TELLING = 0.05

Facts = list[tuple[str, str]]


def why_facts(task: tuning_pb2.TuningTask, now: datetime) -> Facts:
    """Return the answer as names and values, the sentence that says most first; empty values say nothing."""
    name = f"{task.task_id} ({task.spec.display_name})" if task.spec.display_name else task.task_id
    if task.state in ENDS:
        return [("task", f"{name} {ENDS[task.state]}"), *_ended(task, now)]
    if task.state == QUEUED:
        return [("task", f"{name} is waiting"), *_waiting(task, now)]
    if task.state == tuning_pb2.TASK_STATE_PAUSED:
        return [("task", f"{name} is paused"), ("next", f"let it go on: alto resume {task.task_id}")]
    return [("task", f"{name} {STOPS.get(task.state, 'is running')}"), *_running(task, now)]


def sharing_text(forecast: tuning_pb2.TaskForecast) -> str:
    """Return whose executor a task shares as a guest; empty when it has GPUs of its own."""
    if not forecast.is_guest:
        return ""
    whose = f"{forecast.host_task_id}'s executor" if forecast.host_task_id else "the executor of another tenant's task"
    return f"it shares {whose}: both are over the same base model"


def end_text(forecast: tuning_pb2.TaskForecast, now: datetime) -> str:
    """Return when a task is expected to end, and how sure that is; empty when it is not known."""
    if not forecast.HasField("end_time"):
        return ""
    text = moment_text(forecast.end_time, now)
    left_s = forecast.end_time.ToDatetime(tzinfo=UTC).timestamp() - now.timestamp()
    low, high = (_after_s(forecast.end_time, end) for end in (forecast.earliest_end_time, forecast.latest_end_time))
    if forecast.HasField("latest_end_time") and high - low > max(2.0, WORTH_TELLING * left_s):
        low_s, high_s = max(0.0, left_s + low), max(0.0, left_s + high)
        text += f"; in nine of ten cases between {duration_text(low_s)} and {duration_text(high_s)} from now"
    return text


def moment_text(stamp: Timestamp, now: datetime) -> str:
    """Return a moment as people say it: how long from now, and the time of day."""
    moment = stamp.ToDatetime(tzinfo=UTC)
    seconds = (moment - now).total_seconds()
    local = moment.astimezone()
    clock = local.strftime("%H:%M" if abs(seconds) < 20 * 3600 else "%Y-%m-%d %H:%M")
    if abs(seconds) < 1:
        return f"now ({clock})"
    return f"in about {duration_text(seconds)} ({clock})" if seconds > 0 else f"{duration_text(-seconds)} ago ({clock})"


def _waiting(task: tuning_pb2.TuningTask, now: datetime) -> Facts:
    forecast = task.forecast
    begins = ""
    if forecast.HasField("start_time"):
        begins = moment_text(forecast.start_time, now)
    elif task.queue.HasField("predicted_start_time"):
        begins = moment_text(task.queue.predicted_start_time, now)
    loading = task.queue.reason == "STARTING"
    longest = ""
    if forecast.HasField("longest_end_time") and _after_s(forecast.end_time, forecast.longest_end_time) > 1:
        longest = f"{moment_text(forecast.longest_end_time, now)}, if no trial stops early"
    return [
        ("why", task.queue.explanation),
        ("waits for", _waits_for(forecast)),
        ("starts", begins if begins or loading else "not foreseen: nothing that could hold it takes work"),
        ("ends", end_text(forecast, now)),
        ("at the latest", longest),
        ("first in line", _first_in_line(forecast, now)),
        ("sooner if", "; or ".join(filter(None, (_change_text(change) for change in forecast.changes)))),
    ]


def _running(task: tuning_pb2.TuningTask, now: datetime) -> Facts:
    forecast = task.forecast
    ends = end_text(forecast, now)
    if not ends and task.HasField("time_remaining"):
        ends = f"in about {duration_text(task.time_remaining.ToTimedelta().total_seconds())}"
    stopped = task.savings.trials_stopped
    done = percent_text(task.fraction_done)
    if stopped:
        done += f"; {plural(stopped, 'trial')} of {task.trial_count} stopped early"
    return [
        ("why", sharing_text(forecast) or "it has the GPUs it asked for"),
        ("shared by", ", ".join(forecast.guest_task_ids)),
        ("node", task.node_id),
        ("started", moment_text(task.start_time, now) if task.HasField("start_time") else ""),
        ("done", done),
        ("ends", ends),
        ("at the latest", moment_text(forecast.longest_end_time, now) if forecast.HasField("longest_end_time") else ""),
    ]


def _ended(task: tuning_pb2.TuningTask, now: datetime) -> Facts:
    took = ""
    if task.HasField("start_time") and task.HasField("end_time"):
        took = f"{duration_text(_after_s(task.start_time, task.end_time))} from its first start"
    best = f"{task.best_trial_id}, validation loss {loss_text(task.best_validation_loss)}" if task.best_trial_id else ""
    return [
        ("why", task.failure.message),
        ("reason", task.failure.reason),
        ("ended", moment_text(task.end_time, now) if task.HasField("end_time") else ""),
        ("took", took),
        ("best", best),
        ("fetch it", f"alto download {task.task_id}" if best else ""),
    ]


def _waits_for(forecast: tuning_pb2.TaskForecast) -> str:
    own = list(forecast.waits_for[:MOST_NAMED])
    more = len(forecast.waits_for) - len(own)
    parts = [f"your {', '.join(own)}" + (f" and {more} more of yours" if more else "")] if own else []
    if forecast.waits_for_others:
        parts.append(f"{plural(forecast.waits_for_others, 'task')} of others")
    return ", and ".join(parts)


def _first_in_line(forecast: tuning_pb2.TaskForecast, now: datetime) -> str:
    if not forecast.HasField("first_in_line_time"):
        return ""
    when = moment_text(forecast.first_in_line_time, now)
    is_past = forecast.first_in_line_time.ToDatetime(tzinfo=UTC) <= now
    return "now, before all others of its priority" if is_past else f"{when} at the latest, whatever comes after it"


def _change_text(change: tuning_pb2.ForecastChange) -> str:
    amount = int(change.amount)
    match change.kind:
        case tuning_pb2.FORECAST_CHANGE_KIND_TASKS_END:
            return "a task that it waits for ends early"
        case tuning_pb2.FORECAST_CHANGE_KIND_FEWER_GPUS:
            return f"it asks for {plural(amount, 'GPU')} at most" if amount else ""
        case tuning_pb2.FORECAST_CHANGE_KIND_MORE_GPUS:
            return f"{plural(amount, 'more GPU')} on one node"
        case tuning_pb2.FORECAST_CHANGE_KIND_MORE_QUOTA:
            return f"a task of yours ends, or your quota grows by {plural(amount, 'GPU')}"
        case tuning_pb2.FORECAST_CHANGE_KIND_HIGHER_PRIORITY:
            return f"its priority is {amount} or more"
        case tuning_pb2.FORECAST_CHANGE_KIND_NODE_READY:
            return "a node that can hold it joins, or takes work again"
        case _:
            return ""


def _after_s(start: Timestamp, end: Timestamp) -> float:
    return (end.ToDatetime() - start.ToDatetime()).total_seconds()
