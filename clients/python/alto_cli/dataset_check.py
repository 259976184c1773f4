"""What `alto dataset check` does: read every line, and with a model show what it will see and learn."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alto_cli.extras import needs_extra
from alto_cli.failures import CommandError
from alto_cli.output import print_facts, print_json, say
from alto_cli.quiet import quiet_libraries
from alto_cli.view.wording import bytes_text


def check_dataset(
    path: Path, model: str, objective: str, loss_scope: str, max_length: int | None, json_output: bool
) -> None:
    """Check `path` and print what it is; raise `CommandError` naming the lines that are not sound."""
    with needs_extra("training", "checking a dataset"):
        from alto_common.dataset_rows import DatasetError, check_objective, scan
    goal = _objective(objective, loss_scope)
    try:
        facts = scan(path)
        if unfit := check_objective(facts.format, goal):
            raise DatasetError(unfit)
        if model:
            _describe(path, model, goal, max_length, json_output)
            return
    except DatasetError as error:
        raise CommandError(f"{path} cannot be used", *(str(found) for found in error.violations)) from None
    if json_output:
        print_json(asdict(facts))
        return
    print_facts(
        [
            ("rows", f"{facts.rows:,} of {facts.format}"),
            ("size", bytes_text(facts.bytes)),
            ("duplicates", f"{facts.duplicates:,}"),
            ("longest row", f"{facts.longest_row_characters:,} characters"),
            ("sha256", facts.sha256),
        ]
    )
    say("every line is sound; --model NAME shows tokens, what is cut off, and where the loss is taken")


def _describe(path: Path, model: str, objective: Any, max_length: int | None, json_output: bool) -> None:
    with needs_extra("training", "showing what a model sees"):
        quiet_libraries("cpu")
        from alto_common.base_models import BaseModelError, context_length, list_models, load_tokenizer
        from alto_common.tuning import TrialConfig
        from alto_training.executor.data.report import describe
        from alto_training.executor.data.segments import TokenizerError
        from alto_training.executor.loading import locate_base_model
    try:
        folder = locate_base_model(str(Path(model).resolve()) if Path(model).is_dir() else model)
        tokenizer = load_tokenizer(folder)
        kept = max_length or min(TrialConfig.max_length, context_length(folder))
    except BaseModelError as error:
        here = ", ".join(list_models()) or "none yet"
        named = [] if here in error.cure else [f"models on this machine: {here}"]
        raise CommandError(str(error), *named, "fetch a small one: alto models fetch") from None
    with tempfile.TemporaryDirectory() as cache:
        try:
            report = describe(path, tokenizer, objective, Path(cache), kept)
        except TokenizerError as error:
            raise CommandError(f"--model {model}: {error}") from None
    if json_output:
        print_json(report.as_json())
    else:
        print(report.as_text())


def _objective(kind: str, loss_scope: str) -> Any:
    from alto_common.tuning import LossScope, Objective, ObjectiveKind

    try:
        return Objective(ObjectiveKind(kind), LossScope(loss_scope))
    except ValueError as error:
        raise CommandError(f"{error}", "--objective is sft or dpo; --loss-scope is completion or all") from None
