"""YAML with the line of every value, without the surprises of YAML 1.1 that bite in a task file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

Location = tuple[str | int, ...]
MAX_DEPTH = 20


class YamlError(ValueError):
    """Text that is no usable YAML; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class YamlDocument:
    """A document's data, and the line (from 1) of the value at each location (keys and indices from the top)."""

    data: Any
    lines: dict[Location, int]

    def line_of(self, location: Location) -> int:
        """Return the line of a location, or of the nearest one around it that is there."""
        while location not in self.lines and location:
            location = location[:-1]
        return self.lines.get(location, 1)


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number, as JSON and YAML 1.2 do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> YamlDocument:
    """Return the document; raise `YamlError` for bad syntax, a key given twice, an empty value or a reference."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise YamlError(1, "it is empty: write at least base_model, dataset and search")
        lines: dict[Location, int] = {}
        return YamlDocument(_value(loader, node, (), lines), lines)
    except RecursionError:
        raise YamlError(1, "it is nested too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(mark.line + 1 if mark else 1, f"it is not YAML here: {error.problem}") from None
    except yaml.YAMLError as error:
        raise YamlError(1, f"it is not YAML: {error}") from None
    finally:
        loader.dispose()


def _value(loader: _Loader, node: yaml.Node, location: Location, lines: dict[Location, int]) -> Any:
    line = node.start_mark.line + 1
    if location in lines or len(location) > MAX_DEPTH:
        raise YamlError(line, "it is nested too deep")
    lines[location] = line
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            if not key or key == "<<":
                raise YamlError(key_node.start_mark.line + 1, "keys must be plain words here")
            if key in mapping:
                raise YamlError(key_node.start_mark.line + 1, f"the key {key!r} is given twice: keep one of them")
            mapping[key] = _value(loader, value_node, (*location, key), lines)
            lines[(*location, key)] = key_node.start_mark.line + 1
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*location, index), lines) for index, item in enumerate(node.value)]
    value = loader.construct_object(node)
    if value is None:
        name = ".".join(str(part) for part in location) or "the file"
        raise YamlError(line, f"{name} has no value: give one, or leave the key out")
    # A date or a binary blob has no place in a task file: keep what was written.
    return value if isinstance(value, bool | int | float | str) else node.value
