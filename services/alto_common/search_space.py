"""Search spaces: which configurations a tuning task tries, and how a space becomes a list of named trials.

A space has a base configuration, which its configurations share, and one of three kinds: written out one by one, a grid
(every combination of listed values), or random draws (values, ranges, logarithmic ranges). Any field of `TrialConfig`
may vary; those of its schedule are named "schedule.kind" and so on. Expansion is deterministic: the same space gives
the same trials in the same order, on every machine.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from alto_common.config_fields import CONFIG_FIELDS, WHOLE_NUMBER_FIELDS, FieldTypeError, with_field
from alto_common.tuning import Trial, TrialConfig
from alto_common.violations import Violation

MAX_TRIALS = 1000


@dataclass(frozen=True)
class Values:
    """One of these values; the only domain that a grid takes."""

    values: tuple[object, ...]


@dataclass(frozen=True)
class Uniform:
    """Any number from `low` to `high`, both included where the field is a whole number."""

    low: float
    high: float

    def draw(self, generator: random.Random, *, whole: bool) -> float:
        """Return one number of the range."""
        return generator.randint(round(self.low), round(self.high)) if whole else generator.uniform(self.low, self.high)


@dataclass(frozen=True)
class LogUniform:
    """Any number from `low` (above 0) to `high`, its logarithm uniform; rounded where the field is a whole number."""

    low: float
    high: float

    def draw(self, generator: random.Random, *, whole: bool) -> float:
        """Return one number of the range."""
        drawn = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        drawn = min(max(drawn, self.low), self.high)
        return round(drawn) if whole else drawn


Domain = Values | Uniform | LogUniform


@dataclass(frozen=True)
class Dimension:
    """A field of `TrialConfig` ("learning_rate", "schedule.kind") and what it may be."""

    field: str
    domain: Domain


@dataclass(frozen=True)
class ExplicitSearch:
    """Configurations written out one by one, each whole: the base plays no part."""

    configs: tuple[TrialConfig, ...]


@dataclass(frozen=True)
class GridSearch:
    """Every combination of the dimensions' values, the last dimension changing fastest."""

    dimensions: tuple[Dimension, ...]


@dataclass(frozen=True)
class RandomSearch:
    """`trials` independent draws. Configurations drawn twice are tried once, so there may be fewer trials."""

    dimensions: tuple[Dimension, ...]
    trials: int
    seed: int = 0


Kind = ExplicitSearch | GridSearch | RandomSearch


@dataclass(frozen=True)
class SearchSpace:
    """Which configurations to try."""

    kind: Kind
    base: TrialConfig = field(default_factory=TrialConfig)


class SearchSpaceError(ValueError):
    """A search space that cannot be expanded; `violations` name each field, its value and the cure."""

    def __init__(self, violations: list[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(str(violation) for violation in violations))


def at_most(max_trials: int) -> str:
    """Return the cure of a space that holds more configurations than it may."""
    return f"the space may hold at most {max_trials:,} configurations"


def expand(space: SearchSpace, max_trials: int = MAX_TRIALS, field_prefix: str = "search_space.") -> tuple[Trial, ...]:
    """Return the trials of a space ("trial-001", "trial-002", ...), equal configurations once; at least one.

    Raises `SearchSpaceError` for an empty space, more than `max_trials` configurations, a field that there is not, and
    a value of the wrong type or out of range; fields have their paths in alto.v1.SearchSpace. Whether a configuration
    fits the base model is another question: `alto_common.base_models.check_targets`.
    """
    violations = _violations(space, max_trials, field_prefix)
    if violations:
        raise SearchSpaceError(violations)
    configs = list(dict.fromkeys(_configs(space)))
    digits = max(3, len(str(len(configs))))
    return tuple(Trial(f"trial-{number:0{digits}}", config) for number, config in enumerate(configs, start=1))


def _configs(space: SearchSpace) -> Iterator[TrialConfig]:
    kind = space.kind
    if isinstance(kind, ExplicitSearch):
        yield from kind.configs
    elif isinstance(kind, GridSearch):
        columns = [one.domain.values for one in kind.dimensions if isinstance(one.domain, Values)]
        for combination in itertools.product(*columns):
            config = space.base
            for dimension, value in zip(kind.dimensions, combination, strict=True):
                config = with_field(config, dimension.field, value)
            yield config
    else:
        # Python's own generator: its sequence is the same on every platform and in every version.
        generator = random.Random(kind.seed)
        for _ in range(kind.trials):
            config = space.base
            for dimension in kind.dimensions:
                config = with_field(config, dimension.field, _draw(dimension, generator))
            yield config


def _draw(dimension: Dimension, generator: random.Random) -> object:
    if isinstance(dimension.domain, Values):
        return dimension.domain.values[generator.randrange(len(dimension.domain.values))]
    return dimension.domain.draw(generator, whole=dimension.field in WHOLE_NUMBER_FIELDS)


def _violations(space: SearchSpace, max_trials: int, prefix: str) -> list[Violation]:
    kind = space.kind
    if isinstance(kind, ExplicitSearch):
        where = prefix + "explicit.configs"
        if not kind.configs:
            return [Violation(where, [], "the search space is empty: give at least one configuration")]
        if len(kind.configs) > max_trials:
            return [Violation(where, len(kind.configs), at_most(max_trials))]
        return [
            violation
            for index, config in enumerate(kind.configs)
            for violation in config.violations(f"{where}[{index}].")
        ]

    is_grid = isinstance(kind, GridSearch)
    where = prefix + ("grid." if is_grid else "random.")
    found = space.base.violations(prefix + "base.")
    if not kind.dimensions:
        cure = "the search space is empty: give at least one field and what it may be"
        found.append(Violation(where + "dimensions", [], cure))
    names = [dimension.field for dimension in kind.dimensions]
    for index, dimension in enumerate(kind.dimensions):
        place = f"{where}dimensions[{index}]"
        if dimension.field in names[:index]:
            found.append(Violation(f"{place}.field", dimension.field, "name each field once"))
        found += _dimension_violations(space.base, dimension, place, is_grid=is_grid)
    if isinstance(kind, RandomSearch):
        if not 1 <= kind.trials <= max_trials:
            found.append(Violation(where + "trials", kind.trials, f"give at least 1; {at_most(max_trials)}"))
    elif not found:
        size = math.prod(len(one.domain.values) for one in kind.dimensions if isinstance(one.domain, Values))
        if size > max_trials:
            cure = f"{at_most(max_trials)}: list fewer values, or draw from them at random"
            found.append(Violation(where + "dimensions", f"{size:,} combinations", cure))
    return found


def _dimension_violations(base: TrialConfig, dimension: Dimension, place: str, *, is_grid: bool) -> list[Violation]:
    name, domain = dimension.field, dimension.domain
    if name not in CONFIG_FIELDS:
        return [Violation(f"{place}.field", name, "give one of " + ", ".join(CONFIG_FIELDS))]
    if isinstance(domain, Values):
        if not domain.values:
            return [Violation(f"{place}.values.values", [], "the search space is empty: give at least one value")]
        checked = [(f"{place}.values.values[{index}]", value) for index, value in enumerate(domain.values)]
        return [one for where, value in checked for one in _value_violations(base, name, where, value)]
    kind = "uniform" if isinstance(domain, Uniform) else "log_uniform"
    if is_grid:
        return [
            Violation(f"{place}.{kind}", [domain.low, domain.high], "a grid takes values: list them, or draw at random")
        ]
    found = []
    if not CONFIG_FIELDS[name].is_number:
        found.append(Violation(f"{place}.{kind}", name, "this field is no number: list its values"))
    elif not domain.low <= domain.high or not math.isfinite(domain.high - domain.low):
        found.append(Violation(f"{place}.{kind}", [domain.low, domain.high], "give finite bounds, the lower one first"))
    elif isinstance(domain, LogUniform) and domain.low <= 0:
        found.append(Violation(f"{place}.{kind}.low", domain.low, "a logarithmic range begins above 0"))
    else:
        # A whole-number field takes bounds such as 8.0; every number between sound bounds is sound.
        for bound in ("low", "high"):
            found += _value_violations(base, name, f"{place}.{kind}.{bound}", getattr(domain, bound))
    return found


def _value_violations(base: TrialConfig, name: str, where: str, value: object) -> list[Violation]:
    """Return what is wrong with one value of a field, told at `where` the caller wrote it."""
    try:
        config = with_field(base, name, value)
    except FieldTypeError as error:
        return [Violation(where, value, str(error))]
    return [
        Violation(where, value, violation.cure)
        for violation in config.violations()
        if violation.field == name or violation.field.startswith(f"{name}.")
    ]
