"""How a search ended: the leaderboard, what early exit saved, what was gained over the base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alto.v1 import tuning_pb2

from alto_cli.view.story import Story, ranked
from alto_cli.view.trial_words import config_values, rule_text, state_word, varying_fields
from alto_cli.view.wording import duration_text, loss_text, percent_text, plural, printable

MOST_ROWS = 20
MOST_FIELD_COLUMNS = 4


def leaderboard_columns(trials: Sequence[tuning_pb2.Trial]) -> list[str]:
    """Return the columns of the leaderboard of these trials."""
    return ["", "trial", *_fields(trials), "best val loss", "at step", "samples", "end"]


def leaderboard_rows(trials: Sequence[tuning_pb2.Trial], most: int = MOST_ROWS) -> list[list[str]]:
    """Return the rows, best first, at most `most`."""
    fields = _fields(trials)
    rows = []
    for place, trial in enumerate(ranked(list(trials))[:most], start=1):
        values = config_values(trial.config)
        has_loss = trial.HasField("best_validation_loss")
        rows.append(
            [
                str(place) if has_loss else "-",
                trial.trial_id,
                *(values.get(field, "-") for field in fields),
                loss_text(trial.best_validation_loss if has_loss else None),
                f"{trial.best_step}/{trial.total_steps}" if has_loss else "-",
                f"{trial.samples_trained:,}",
                _end(trial),
            ]
        )
    return rows


def closing_sentences(story: Story, adapter_folder: str = "") -> list[str]:
    """Return what is left to say under the leaderboard."""
    task, trials = story.task, list(story.trials.values())
    sentences = []
    if len(trials) > MOST_ROWS:
        sentences.append(f"{len(trials) - MOST_ROWS} more: alto trials {task.task_id}")
    sentences.extend(_savings(task, trials))
    if gain := _gain(task):
        sentences.append(gain)
    if task.HasField("start_time") and task.HasField("end_time"):
        seconds = (task.end_time.ToDatetime() - task.start_time.ToDatetime()).total_seconds()
        sentences.append(f"Trained for {duration_text(seconds)}.")
    if task.state == tuning_pb2.TASK_STATE_FAILED:
        sentences.append(f"The task failed: {printable(task.failure.message or task.failure.reason)}")
    if adapter_folder:
        sentences.append(f"The best adapter ({task.best_trial_id}, PEFT format) lies in {adapter_folder}")
    elif task.best_trial_id:
        sentences.append(f"Fetch the best adapter: alto download {task.task_id} --output FOLDER")
    return sentences


def _savings(task: tuning_pb2.TuningTask, trials: Sequence[tuning_pb2.Trial]) -> list[str]:
    """Say what early exit saved, in samples, with the rules that did it."""
    stopped = [trial for trial in trials if trial.state == tuning_pb2.TRIAL_STATE_STOPPED]
    planned = task.savings.samples_planned
    if not planned:
        return []
    if not stopped:
        return [f"Early exit stopped no trial; {task.savings.samples_trained:,} of {planned:,} samples were trained."]
    saved = max(0, planned - task.savings.samples_trained)
    rules = ", ".join(f"{count} {rule}" for rule, count in Counter(rule_text(trial) for trial in stopped).most_common())
    return [
        f"Early exit stopped {len(stopped)} of {plural(len(trials), 'trial')}: {rules}.",
        f"It saved {saved:,} of {planned:,} samples ({percent_text(saved / planned)}).",
    ]


def _gain(task: tuning_pb2.TuningTask) -> str:
    """Compare the best adapter with the base model."""
    if not task.HasField("best_validation_loss"):
        return ""
    best = f"{loss_text(task.best_validation_loss)} with {task.best_trial_id}"
    if task.base_validation_loss <= 0:
        return f"Validation loss: {best}."
    base, share = task.base_validation_loss, 1 - task.best_validation_loss / task.base_validation_loss
    change = f"{percent_text(share)} lower" if share > 0 else "no better"
    return f"Validation loss: {loss_text(base)} for the base model, {best}: {change}."


def _end(trial: tuning_pb2.Trial) -> str:
    if trial.state in (tuning_pb2.TRIAL_STATE_STOPPED, tuning_pb2.TRIAL_STATE_FAILED):
        return f"{state_word(trial)}: {rule_text(trial)}"
    return state_word(trial)


def _fields(trials: Sequence[tuning_pb2.Trial]) -> list[str]:
    return varying_fields(trials)[:MOST_FIELD_COLUMNS]
