"""Placement over TLS: whom its listener takes, and what is wrong with its settings."""

import grpc
from alto.v1 import placement_service_pb2, placement_service_pb2_grpc
from alto_common.rpc.channel import bearer_metadata, service_channel
from alto_placement.server import PlacementServer
from alto_placement.settings import PlacementSettings
from certificates import Authority, as_settings
from processes import why_it_does_not_start

TOKEN = "the-token"


async def nodes(channel):
    stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
    try:
        request = placement_service_pb2.ListNodesRequest()
        return list((await stub.ListNodes(request, metadata=bearer_metadata(TOKEN), timeout=20)).nodes)
    except grpc.aio.AioRpcError as error:
        return error.code().name


async def test_only_services_with_a_certificate_are_answered(tmp_path, authority):
    files = authority.issue("placement", roots=authority.roots)
    settings = PlacementSettings(
        service_token=TOKEN,
        listen="127.0.0.1:0",
        database_url=f"sqlite+aiosqlite:///{tmp_path / 'placement.db'}",
        tls_certificate=files.certificate,
        tls_key=files.key,
        tls_roots=files.roots,
    )
    placement = PlacementServer(settings)
    await placement.start()
    address = f"127.0.0.1:{placement.server.port}"
    try:
        async with service_channel(address, authority.issue("node", roots=authority.roots)) as channel:
            assert await nodes(channel) == []
        stranger = Authority(tmp_path / "strangers").issue("node", roots=authority.roots)
        for refused in (service_channel(address, stranger), service_channel(address)):
            async with refused as channel:
                assert await nodes(channel) == "UNAVAILABLE"
    finally:
        await placement.stop()


def test_roots_without_a_certificate_are_told(tmp_path, authority):
    named = {"ALTO_PLACEMENT_SERVICE_TOKEN": "PASSWORD", "ALTO_PLACEMENT_TLS_ROOTS": str(authority.roots)}
    last = why_it_does_not_start("alto_placement", tmp_path / "home", named)
    assert "ALTO_PLACEMENT_TLS_ROOTS is set without a certificate: give ALTO_PLACEMENT_TLS_CERTIFICATE and" in last


def test_a_key_of_another_certificate_is_told(tmp_path, authority):
    files, other = authority.issue("placement"), authority.issue("other")
    named = {"ALTO_PLACEMENT_SERVICE_TOKEN": "PASSWORD", **as_settings(files, "ALTO_PLACEMENT_")}
    named["ALTO_PLACEMENT_TLS_KEY"] = str(other.key)
    last = why_it_does_not_start("alto_placement", tmp_path / "home", named)
    assert last.startswith(
        f"alto-placement: ALTO_PLACEMENT_TLS_KEY: {other.key} is not the key of the first certificate"
    )
