"""A trial in words: its state, why it stopped, and those of its settings that differ from its siblings'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alto.v1 import tuning_pb2
from google.protobuf.message import Message

from alto_cli.view.wording import number_text, printable
from alto_cli.wire_json import enum_word

# Shown together they would say the same twice.
IMPLIED = {"max_steps": "epochs"}


def state_word(trial: tuning_pb2.Trial) -> str:
    """Return a trial's state as one lower-case word."""
    return enum_word(tuning_pb2.TrialState.DESCRIPTOR, trial.state).lower()


def task_state_word(task: tuning_pb2.TuningTask) -> str:
    """Return a task's state as one lower-case word."""
    return enum_word(tuning_pb2.TaskState.DESCRIPTOR, task.state).lower()


def reason_text(trial: tuning_pb2.Trial) -> str:
    """Return why a trial stopped, paused or failed; empty while it goes on."""
    if trial.state == tuning_pb2.TRIAL_STATE_FAILED:
        return printable(trial.failure.message or trial.failure.reason)
    if trial.state in (tuning_pb2.TRIAL_STATE_STOPPED, tuning_pb2.TRIAL_STATE_PAUSED) and trial.HasField("decision"):
        return printable(_decision_text(trial.decision))
    return ""


def _decision_text(decision: tuning_pb2.StoppingDecision) -> str:
    """Return the rule and its numbers; an opening such as "Stopped as underperforming:" would say the rule twice."""
    opening, colon, numbers = decision.reason.partition(": ")
    has_opening = bool(colon) and not any(character.isdigit() for character in opening)
    details = numbers if has_opening else decision.reason
    return f"{decision.rule}: {details}" if decision.rule and details else decision.rule or details


def rule_text(trial: tuning_pb2.Trial) -> str:
    """Return the rule that stopped a trial, in a word."""
    if trial.state == tuning_pb2.TRIAL_STATE_FAILED:
        return printable(trial.failure.reason.lower().replace("_", " ")) or "failed"
    return printable(trial.decision.rule or trial.decision.policy) or "in an earlier run"


def varying_fields(trials: Sequence[tuning_pb2.Trial]) -> list[str]:
    """Return the settings that are not the same in all trials, in the order of the contract."""
    flat = [config_values(trial.config) for trial in trials]
    names = list(dict.fromkeys(name for values in flat for name in values))
    varying = [name for name in names if len({str(values.get(name)) for values in flat}) > 1]
    return [name for name in varying if IMPLIED.get(name) not in varying]


def config_values(config: tuning_pb2.TrialConfig) -> dict[str, str]:
    """Return a configuration's settings as text, those of its schedule under "schedule.kind" and so on."""
    return {name: _text(value) for name, value in _flat(config, "")}


def config_text(trial: tuning_pb2.Trial, fields: Sequence[str]) -> str:
    """Return these settings of a trial on one line."""
    values = config_values(trial.config)
    return ", ".join(f"{name} {values.get(name, '-')}" for name in fields)


def _flat(message: Message, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for field, value in message.ListFields():
        name = prefix + field.name
        if field.name in ("target_modules", "layers"):
            found.append((name, list(value.names if field.name == "target_modules" else value.indices)))
        elif field.message_type is not None:
            found.extend(_flat(value, f"{name}."))
        elif field.enum_type is not None:
            found.append((name, enum_word(field.enum_type, value).lower()))
        else:
            found.append((name, value))
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(printable(str(item)) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number_text(value) if isinstance(value, int | float) else printable(str(value))
