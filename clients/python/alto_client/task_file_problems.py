"""What is wrong with a task file, as sentences with line, key, value and cure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alto_client.yaml_lines import Location, YamlDocument

SHOWN_CHARACTERS = 60
CURES = {
    "float_type": "give a number, such as 2.0e-4",
    "int_type": "give a whole number",
    "int_from_float": "give a whole number",
    "bool_type": "give true or false",
    "string_type": "give text",
    "list_type": "give a list, such as [a, b]",
    "dict_type": "give a mapping of keys to values",
    "model_type": "give a mapping of keys to values",
    "path_type": "give a path",
}
MISSING = {
    "base_model": "name a base model (`alto models list` shows which there are)",
    "dataset": "give the path of a JSONL or Parquet file",
    "search": "say which configurations to try, with grid, random or list",
    "trials": "say how many configurations to draw",
}


@dataclass(frozen=True)
class Problem:
    """One thing wrong: the line (from 1; 0 for the file itself), the key, its value if it has one, the cure."""

    line: int
    field: str
    value: object
    cure: str

    @classmethod
    def at(cls, document: YamlDocument, location: Location, value: object, cure: str) -> Problem:
        """Return the problem of a location of the document."""
        return cls(document.line_of(location), path_text(location), value, cure)

    def __str__(self) -> str:
        """Return the sentence without its line."""
        if not self.field:
            return self.cure
        value = "" if self.value is None else f" = {shown(self.value)}"
        return f"{self.field}{value}: {self.cure}"


class TaskFileError(ValueError):
    """A task file that cannot be used; `problems` are all that were found, in the order of the file."""

    def __init__(self, path: Path, problems: Iterable[Problem]) -> None:
        self.path = path
        self.problems: Sequence[Problem] = tuple(sorted(problems, key=lambda problem: problem.line))
        super().__init__("\n".join(self.sentences()))

    def sentences(self) -> list[str]:
        """Return one sentence a problem, each beginning with file and line."""
        return [
            f"{self.path}:{problem.line}: {problem}" if problem.line else f"{self.path}: {problem}"
            for problem in self.problems
        ]


def path_text(location: Location) -> str:
    """Return a location as people write it: search.grid.learning_rate[1]."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: object) -> str:
    """Return a value cut to what fits a line."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def problems_of(
    error: ValidationError, document: YamlDocument, known_keys: Callable[[Location], Mapping[str, object]]
) -> list[Problem]:
    """Return what pydantic found, as problems; `known_keys` tells which keys a mapping may have."""
    return [_problem(found, document, known_keys) for found in error.errors(include_url=False)]


def _problem(
    found: ErrorDetails, document: YamlDocument, known_keys: Callable[[Location], Mapping[str, object]]
) -> Problem:
    location = found["loc"]
    kind = found["type"]
    if kind == "missing":
        return Problem.at(document, location, None, f"it is missing: {MISSING.get(str(location[-1]), 'give it')}")
    if kind == "extra_forbidden":
        return Problem.at(document, location, None, unknown_key(str(location[-1]), known_keys(location[:-1])))
    return Problem.at(document, location, found["input"], cure_of(found))


def cure_of(found: ErrorDetails) -> str:
    """Return what would be accepted where pydantic found this."""
    kind, context = found["type"], found.get("ctx", {})
    if kind == "literal_error":
        return f"give {context['expected']}"
    if kind == "greater_than_equal":
        return f"give a number of at least {context['ge']}"
    if kind in ("less_than", "less_than_equal"):
        return (
            f"give a number {'below' if kind == 'less_than' else 'of at most'} {context.get('lt', context.get('le'))}"
        )
    return CURES.get(kind, found["msg"])


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return what to say of a key that there is not."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"there is no such key; did you mean {close[0]!r}?"
    return f"there is no such key; known are {', '.join(names)}" if names else "there is no such key"
