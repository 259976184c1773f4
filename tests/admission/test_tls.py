"""Admission over TLS: tenants need its roots and their key, services a certificate of their own."""

from dataclasses import replace

import grpc
import pytest
from alto.v1 import admission_service_pb2, admission_service_pb2_grpc
from alto_admission.api_keys import new_key
from alto_admission.server import clock_us
from alto_common.configuration import SettingsError
from alto_common.rpc.channel import bearer_metadata, service_channel
from certificates import Authority, as_settings
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import why_it_does_not_start


@pytest.fixture
def secured(authority):
    """The settings that give admission a certificate, and the roots of those who may call it."""
    files = authority.issue("admission", roots=authority.roots)
    return {name.lower(): path for name, path in as_settings(files).items()}


async def listed(running, roots, tls=True):
    """List a tenant's tasks through the public listener; the code and details when that fails."""
    secret, kept = new_key("acme", ["read"], clock_us(), None)
    await running.server.keys.add(kept)
    address = f"127.0.0.1:{running.server.public.port}"
    credentials = grpc.ssl_channel_credentials(roots.read_bytes()) if tls else None
    opened = grpc.aio.secure_channel(address, credentials) if tls else grpc.aio.insecure_channel(address)
    async with opened as channel:
        stub = admission_service_pb2_grpc.AdmissionServiceStub(channel)
        request = admission_service_pb2.ListTuningTasksRequest()
        try:
            return len((await stub.ListTuningTasks(request, metadata=bearer_metadata(secret), timeout=20)).tasks)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"


async def asked(running, open_channel):
    """Ask after the health of the internal listener, which it tells anyone who is connected; the code when none is."""
    async with open_channel(f"127.0.0.1:{running.server.internal.port}") as channel:
        request = health_pb2.HealthCheckRequest()
        try:
            await health_pb2_grpc.HealthStub(channel).Check(request, timeout=20)
            return "answered"
        except grpc.aio.AioRpcError as error:
            return error.code().name


async def test_tenants_need_the_right_roots_and_no_certificate(started, secured, authority, tmp_path):
    running = await started(**secured)
    assert await listed(running, authority.roots) == 0
    assert "CERTIFICATE_VERIFY_FAILED" in await listed(running, Authority(tmp_path / "strangers").roots)
    assert "UNAVAILABLE" in await listed(running, authority.roots, tls=False)


async def test_services_need_a_certificate_of_the_right_authority(started, secured, authority, tmp_path):
    running = await started(**secured)
    node = authority.issue("node", "node-7.example", roots=authority.roots)
    stranger = Authority(tmp_path / "strangers").issue("node", roots=authority.roots)
    without = grpc.ssl_channel_credentials(authority.roots.read_bytes())
    assert await asked(running, lambda address: service_channel(address, node)) == "answered"
    for open_channel in (
        lambda address: grpc.aio.secure_channel(address, without),
        lambda address: service_channel(address, stranger),
        grpc.aio.insecure_channel,
    ):
        assert await asked(running, open_channel) == "UNAVAILABLE"


async def test_tenants_may_be_shown_a_certificate_of_their_own(started, secured, authority, tmp_path):
    public = Authority(tmp_path / "public")
    shown = public.issue("shown")
    names = {"public_tls_certificate": shown.certificate, "public_tls_key": shown.key}
    running = await started(**secured, **names)
    assert await listed(running, public.roots) == 0
    assert "CERTIFICATE_VERIFY_FAILED" in await listed(running, authority.roots)
    node = authority.issue("node", roots=authority.roots)
    assert await asked(running, lambda address: service_channel(address, node)) == "answered"
    assert await asked(running, grpc.aio.insecure_channel) == "UNAVAILABLE"
    alone = await started(**names)
    assert await listed(alone, public.roots) == 0
    assert await asked(alone, grpc.aio.insecure_channel) == "answered"


def test_what_is_wrong_with_the_public_pair_is_told_by_its_variables(settings_of, authority):
    files = authority.issue("public")
    with pytest.raises(ValueError, match="ALTO_ADMISSION_PUBLIC_TLS_KEY is set without ALTO_ADMISSION_PUBLIC_TLS_CERT"):
        settings_of(public_tls_key=files.key)


async def test_a_public_key_of_another_certificate_is_told(started, authority):
    files = replace(authority.issue("public"), key=authority.issue("other").key)
    with pytest.raises(SettingsError, match=r"^ALTO_ADMISSION_PUBLIC_TLS_KEY: .*is not the key of the first"):
        await started(public_tls_certificate=files.certificate, public_tls_key=files.key)


def test_a_process_without_its_key_file_does_not_start(tmp_path, authority):
    files = authority.issue("admission")
    files.key.unlink()
    named = {"ALTO_ADMISSION_SERVICE_TOKEN": "PASSWORD", **as_settings(files, "ALTO_ADMISSION_")}
    last = why_it_does_not_start("alto_admission", tmp_path / "home", named)
    assert last.startswith(f"alto-admission: ALTO_ADMISSION_TLS_KEY: {files.key}: No such file or directory: give ")
