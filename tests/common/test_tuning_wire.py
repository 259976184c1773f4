"""What goes onto the wire comes back the same, and what is left out takes the default that the contract names."""

from dataclasses import fields

import pytest
from alto.v1 import tuning_pb2
from alto_common import tuning_wire
from alto_common.rpc.interceptor import validate
from alto_common.tuning import (
    EarlyExit,
    Evaluation,
    LossScope,
    Objective,
    ObjectiveKind,
    Schedule,
    ScheduleKind,
    TrialConfig,
)
from hypothesis import given
from hypothesis import strategies as st

shares = st.floats(0, 1)
positive = st.floats(1e-300, 1e300)
schedules = st.builds(Schedule, st.sampled_from(ScheduleKind), shares, shares)
configs = st.builds(
    TrialConfig,
    lora_rank=st.integers(1, 256),
    lora_alpha=positive,
    lora_dropout=st.floats(0, 0.99),
    use_rslora=st.booleans(),
    target_modules=st.lists(st.sampled_from(["q_proj", "k_proj", "all-linear"]), min_size=1).map(tuple),
    layers=st.none() | st.lists(st.integers(0, 99), min_size=1, unique=True).map(tuple),
    learning_rate=positive,
    lora_plus_ratio=positive,
    schedule=schedules,
    batch_size=st.integers(1, 65536),
    gradient_accumulation_steps=st.integers(1, 65536),
    epochs=positive,
    max_steps=st.none() | st.integers(1, 2**32 - 1),
    max_length=st.integers(2, 2**32 - 1),
    weight_decay=st.floats(0, 10),
    adam_beta1=st.floats(0, 0.99),
    adam_beta2=st.floats(0, 0.99),
    adam_epsilon=positive,
    max_grad_norm=st.floats(0, 10),
    seed=st.integers(0, 2**63 - 1),
)


@given(configs)
def test_a_configuration_comes_back_the_same(config):
    message = tuning_wire.trial_config_to_wire(config)
    validate(message)
    assert tuning_wire.trial_config_from_wire(tuning_pb2.TrialConfig.FromString(message.SerializeToString())) == config


@given(st.builds(Objective, st.sampled_from(ObjectiveKind), st.sampled_from(LossScope), positive))
def test_an_objective_comes_back_the_same(objective):
    assert tuning_wire.objective_from_wire(tuning_wire.objective_to_wire(objective)) == objective


@given(
    st.builds(
        EarlyExit,
        st.sampled_from(["paper", "none"]),
        shares,
        st.floats(0.01, 1),
        st.integers(2, 9),
        st.integers(1, 9),
        shares,
        shares,
        st.floats(0.01, 1),
    )
)
def test_early_exit_comes_back_the_same(early_exit):
    message = tuning_wire.early_exit_to_wire(early_exit)
    validate(message)
    assert tuning_wire.early_exit_from_wire(message) == early_exit


@given(st.builds(Evaluation, st.integers(1, 1000), st.none() | st.integers(1, 1000)))
def test_an_evaluation_comes_back_the_same(evaluation):
    assert tuning_wire.evaluation_from_wire(tuning_wire.evaluation_to_wire(evaluation)) == evaluation


@pytest.mark.parametrize(
    ("from_wire", "message", "default"),
    [
        (tuning_wire.trial_config_from_wire, tuning_pb2.TrialConfig(), TrialConfig()),
        (tuning_wire.schedule_from_wire, tuning_pb2.Schedule(), Schedule()),
        (tuning_wire.objective_from_wire, tuning_pb2.Objective(), Objective()),
        (tuning_wire.early_exit_from_wire, tuning_pb2.EarlyExit(), EarlyExit()),
        (tuning_wire.evaluation_from_wire, tuning_pb2.Evaluation(), Evaluation()),
    ],
)
def test_an_empty_message_is_the_default(from_wire, message, default):
    assert from_wire(message) == default


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (tuning_pb2.TrialConfig, TrialConfig),
        (tuning_pb2.Schedule, Schedule),
        (tuning_pb2.Objective, Objective),
        (tuning_pb2.EarlyExit, EarlyExit),
        (tuning_pb2.Evaluation, Evaluation),
    ],
)
def test_both_sides_have_the_same_fields(message, data):
    assert {field.name for field in message.DESCRIPTOR.fields} == {field.name for field in fields(data)}


@pytest.mark.parametrize(
    ("table", "enum"),
    [
        (tuning_wire.SCHEDULE_KINDS, tuning_pb2.ScheduleKind),
        (tuning_wire.OBJECTIVE_KINDS, tuning_pb2.ObjectiveKind),
        (tuning_wire.LOSS_SCOPES, tuning_pb2.LossScope),
    ],
)
def test_every_enum_value_has_a_meaning(table, enum):
    assert set(table) == set(enum.values())


def test_a_configuration_goes_out_with_every_field_set():
    message = tuning_wire.trial_config_to_wire(TrialConfig())
    absent = {field.name for field in message.DESCRIPTOR.fields} - {field.name for field, _ in message.ListFields()}
    assert absent == {"layers", "max_steps"}
