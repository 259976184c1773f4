"""What the operator decides about the plan: weights of the objective, tenants' shares and quotas, reservations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from alto_placement import planner
from alto_placement.sharing import SharingRule


class ObjectiveWeights(BaseModel):
    """Weights of the plan's objective; see `planner.Objective` for what each means.

    Nobody is meant to wait longer than `wait_patience` x the longest wait that first come first served would cause.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    makespan: float = Field(default=1.0, ge=0)
    completion: float = Field(default=1.0, ge=0)
    lateness: float = Field(default=1.0, ge=0)
    patience: float = Field(default=10.0, gt=0)
    min_patience_s: float = Field(default=3600.0, ge=0)
    fairness: float = Field(default=1.0, ge=0, le=1)
    wait_patience: float = Field(default=float("inf"), gt=0)
    preempt: bool = True


class TenantShare(BaseModel):
    """A tenant's part of the cluster under contention, and what it may hold.

    `quota_gpus` None means no quota. In a `cohort` it may borrow `borrow_gpus` more (None: without limit) that others
    of the cohort leave unused, until they claim them back.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(default=1.0, gt=0)
    quota_gpus: int | None = Field(default=None, ge=0)
    cohort: str = ""
    borrow_gpus: int | None = Field(default=None, ge=0)


class ReservedGpus(BaseModel):
    """GPUs of one node that are kept free from `start_time` to `end_time`, for maintenance or for people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reservation_id: str = Field(min_length=1)
    node_id: str = Field(min_length=1)
    gpu_indices: tuple[int, ...] = Field(min_length=1)
    start_time: AwareDatetime
    end_time: AwareDatetime


@dataclass(frozen=True)
class Policy:
    """What holds for every plan."""

    objective: planner.Objective = field(default_factory=planner.Objective)
    tenants: tuple[planner.Tenant, ...] = ()
    reservations: tuple[planner.Reservation, ...] = ()
    sharing: SharingRule = SharingRule.TENANT
    wait_patience: float = float("inf")


def policy_of(
    weights: ObjectiveWeights,
    shares: Iterable[tuple[str, TenantShare]],
    reserved: Sequence[ReservedGpus],
    sharing: SharingRule = SharingRule.TENANT,
) -> Policy:
    """Return the policy that these settings make. Raises ValueError for reservations that contradict each other."""
    for reservation in reserved:
        if reservation.end_time <= reservation.start_time:
            raise ValueError(f"reservation {reservation.reservation_id!r} ends before it starts: give a later end_time")
        if min(reservation.gpu_indices) < 0:
            raise ValueError(f"reservation {reservation.reservation_id!r}: GPU indices begin at 0")
    for one, other in combinations(reserved, 2):
        if one.reservation_id == other.reservation_id:
            raise ValueError(f"two reservations are called {one.reservation_id!r}: give each a name of its own")
        common = set(one.gpu_indices) & set(other.gpu_indices) if one.node_id == other.node_id else set()
        if common and one.start_time < other.end_time and other.start_time < one.end_time:
            raise ValueError(
                f"reservations {one.reservation_id!r} and {other.reservation_id!r} keep GPU {min(common)} of node "
                f"{one.node_id!r} at the same time: move one of them"
            )
    return Policy(
        planner.Objective(**weights.model_dump(exclude={"wait_patience"})),
        tuple(planner.Tenant(tenant, **share.model_dump()) for tenant, share in shares),
        tuple(_reservation(reservation) for reservation in reserved),
        sharing,
        weights.wait_patience,
    )


def _reservation(reserved: ReservedGpus) -> planner.Reservation:
    part = planner.Part(reserved.node_id, tuple(sorted(set(reserved.gpu_indices))))
    return planner.Reservation(reserved.reservation_id, part, _unix_s(reserved.start_time), _unix_s(reserved.end_time))


def _unix_s(moment: datetime) -> float:
    return moment.timestamp()
