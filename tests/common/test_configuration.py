"""Settings from environment variables: what is wrong with them is told by name, and no secret with it."""

from typing import ClassVar

import pytest
from alto_common.configuration import ServiceSettings
from alto_placement.settings import PlacementSettings
from pydantic import Field


class Settings(ServiceSettings):
    prefix: ClassVar[str] = "ALTO_SAMPLE_"

    database_url: str = "sqlite://"
    lease_s: float = Field(default=1.0, gt=0)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("ALTO_SAMPLE_SERVICE_TOKEN", " the-token\n")
    monkeypatch.setenv("ALTO_SAMPLE_DATABASE_URL", "postgresql://alto:PASSWORD@host/db")


def test_variables_become_settings():
    settings = Settings.load()
    assert (settings.service_token, settings.lease_s) == ("the-token", 1.0)


@pytest.mark.parametrize("token", [None, "", "  "])
def test_there_is_no_service_without_a_token(monkeypatch, token):
    monkeypatch.delenv("ALTO_SAMPLE_SERVICE_TOKEN")
    if token is not None:
        monkeypatch.setenv("ALTO_SAMPLE_SERVICE_TOKEN", token)
    with pytest.raises(ValueError, match=r"^ALTO_SAMPLE_SERVICE_TOKEN: ") as told:
        Settings.load()
    assert "PASSWORD" not in str(told.value)


def test_every_variable_at_fault_is_named_and_no_value_is_told(monkeypatch):
    monkeypatch.setenv("ALTO_SAMPLE_LEASE_S", "-1")
    monkeypatch.setenv("ALTO_SAMPLE_SERVICE_TOKEN", "")
    with pytest.raises(ValueError, match="ALTO_SAMPLE_LEASE_S: ") as told:
        Settings.load()
    assert "ALTO_SAMPLE_SERVICE_TOKEN: " in str(told.value)
    assert "PASSWORD" not in str(told.value)
    assert told.value.__suppress_context__


def test_a_fault_within_a_setting_says_where(monkeypatch):
    monkeypatch.setenv("ALTO_PLACEMENT_SERVICE_TOKEN", "the-token")
    monkeypatch.setenv("ALTO_PLACEMENT_TENANTS", '{"acme": {"quota_gpus": -1}}')
    with pytest.raises(ValueError, match="ALTO_PLACEMENT_TENANTS") as told:
        PlacementSettings.load()
    assert "acme" in str(told.value)
    assert "the-token" not in str(told.value)


def test_a_variable_that_no_setting_has_is_refused(monkeypatch):
    monkeypatch.setenv("ALTO_SAMPLE_LEASES", "2")
    with pytest.raises(ValueError, match="ALTO_SAMPLE_LEASES"):
        Settings.load()
