"""Settings of alto-placement, read from ALTO_PLACEMENT_* variables; the defaults work on one machine."""

from __future__ import annotations

from typing import ClassVar, Self

from alto_common.configuration import ServiceSettings, home_folder
from pydantic import Field, model_validator

from alto_placement.lifecycle import Rules
from alto_placement.policy import ObjectiveWeights, Policy, ReservedGpus, TenantShare, policy_of
from alto_placement.sharing import SharingRule


class PlacementSettings(ServiceSettings):
    """What the operator may choose. Durations are in seconds.

    A node sends a heartbeat every `heartbeat_s`, at most a third of `lease_s`, and is lost after `lease_s` without one;
    in the last third of that it has what it trains write a checkpoint and stop. A task that failed in a way that
    another attempt may not is tried again after `retry_delay_s`, doubled each time, and given up after `max_failures`
    in a row that came no further; attempts that were lost with their node count, unless it was only cut off. A node on
    which attempts fail before their first tick rests by the same rule, as long as another takes work. One that has not
    been heard of for `keep_lost_s` is forgotten, with its cordon and with what ended on it. `plan_budget_s` is what the
    planner may spend on a plan beyond its fast lists; a plan is made at every event, at most once in `debounce_s`, and
    every `refresh_s` while something runs. Before a plan's orders are given it is thought over for a thousandth of its
    length, at most `decision_budget_s`. `objective`, `tenants` (by name) and `reservations` are the operator's policy,
    as JSON; see `policy`. `sharing` says whose small tasks over one base model may be trained in one executor: "off",
    those of one "tenant", or "all". What was learned of durations is kept every `keep_learned_s`.
    """

    prefix: ClassVar[str] = "ALTO_PLACEMENT_"

    listen: str = "127.0.0.1:7412"
    database_url: str = Field(default_factory=lambda: f"sqlite+aiosqlite:///{home_folder() / 'placement.db'}")
    lease_s: float = Field(default=15.0, gt=0)
    heartbeat_s: float = Field(default=3.0, gt=0)
    max_failures: int = Field(default=3, ge=1)
    retry_delay_s: float = Field(default=2.0, ge=0)
    max_retry_delay_s: float = Field(default=60.0, ge=0)
    keep_lost_s: float = Field(default=86400.0, gt=0)
    plan_budget_s: float = Field(default=0.05, ge=0)
    decision_budget_s: float = Field(default=1.0, ge=0)
    debounce_s: float = Field(default=0.02, ge=0)
    refresh_s: float = Field(default=5.0, gt=0)
    keep_learned_s: float = Field(default=10.0, gt=0)
    objective: ObjectiveWeights = ObjectiveWeights()
    tenants: dict[str, TenantShare] = Field(default_factory=dict)
    reservations: tuple[ReservedGpus, ...] = ()
    sharing: SharingRule = SharingRule.TENANT

    @model_validator(mode="after")
    def _leases_can_be_kept(self) -> Self:
        if self.heartbeat_s > self.lease_s / 3:
            raise ValueError(
                f"ALTO_PLACEMENT_HEARTBEAT_S is {self.heartbeat_s:g} with leases of {self.lease_s:g} s: give at most a "
                "third of ALTO_PLACEMENT_LEASE_S, or nodes stop what they train between two heartbeats"
            )
        return self

    @model_validator(mode="after")
    def _policy_is_sound(self) -> Self:
        policy_of(self.objective, self.tenants.items(), self.reservations)
        return self

    @property
    def policy(self) -> Policy:
        """The part of the settings that the plan depends on."""
        return policy_of(self.objective, self.tenants.items(), self.reservations, self.sharing)

    @property
    def rules(self) -> Rules:
        """The part of the settings that the domain knows."""
        return Rules(
            lease_s=self.lease_s,
            max_failures=self.max_failures,
            retry_delay_s=self.retry_delay_s,
            max_retry_delay_s=self.max_retry_delay_s,
            keep_lost_s=self.keep_lost_s,
        )
