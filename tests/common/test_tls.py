"""TLS of servers and of channels between services, with real certificates over real sockets."""

import asyncio
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import ClassVar

import grpc
import pytest
from alto.v1 import placement_pb2, placement_service_pb2, placement_service_pb2_grpc
from alto_common.configuration import ServiceSettings, SettingsError
from alto_common.rpc.authentication import Scope, ServiceTokenAuthenticator
from alto_common.rpc.channel import bearer_metadata, service_channel
from alto_common.rpc.server import Server, is_loopback
from alto_common.rpc.tls import TlsError, service_tls
from structlog.testing import capture_logs

SERVICE = "alto.v1.PlacementService"
TOKEN = "the-token"
GET_PLAN = f"/{SERVICE}/GetPlan"
WATCH_PLAN = f"/{SERVICE}/WatchPlan"


class Placement(placement_service_pb2_grpc.PlacementServiceServicer):
    def __init__(self):
        self.may_end = asyncio.Event()

    async def GetPlan(self, request, context):
        return placement_service_pb2.GetPlanResponse(plan=placement_pb2.Plan(revision=7))

    async def WatchPlan(self, request, context):
        yield placement_service_pb2.WatchPlanResponse(plan=placement_pb2.Plan(revision=1))
        await self.may_end.wait()
        yield placement_service_pb2.WatchPlanResponse(plan=placement_pb2.Plan(revision=2))


@asynccontextmanager
async def serving(tls, servicer=None):
    scopes = {GET_PLAN: Scope.SERVICE, WATCH_PLAN: Scope.SERVICE}
    server = Server("127.0.0.1:0", ServiceTokenAuthenticator(TOKEN), scopes, [SERVICE], tls=tls)
    placement_service_pb2_grpc.add_PlacementServiceServicer_to_server(servicer or Placement(), server.grpc)
    await server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)


async def revision(channel):
    stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
    request = placement_service_pb2.GetPlanRequest()
    return (await stub.GetPlan(request, metadata=bearer_metadata(TOKEN), timeout=20)).plan.revision


async def answer(channel):
    """What a server answers, or the details of why it cannot be reached."""
    try:
        return await revision(channel)
    except grpc.aio.AioRpcError as error:
        return error.details() if error.code() is grpc.StatusCode.UNAVAILABLE else error


async def asked(address, tls):
    async with service_channel(address, tls) as channel:
        return await answer(channel)


async def asked_without_certificate(address, roots):
    credentials = grpc.ssl_channel_credentials(roots.read_bytes())
    async with grpc.aio.secure_channel(address, credentials) as channel:
        return await answer(channel)


async def test_a_server_is_verified_by_the_roots(authority, stranger):
    async with serving(authority.issue("server")) as address:
        assert await asked_without_certificate(address, authority.roots) == 7
        assert "CERTIFICATE_VERIFY_FAILED" in await asked_without_certificate(address, stranger.roots)
        # Without roots those of public authorities count, and none of them has signed it.
        assert "CERTIFICATE_VERIFY_FAILED" in await asked(address, authority.issue("client"))


async def test_a_server_is_verified_by_the_name_that_it_is_called_by(authority):
    async with serving(authority.issue("server", "placement.example")) as address:
        assert "Hostname Verification Check failed" in await asked_without_certificate(address, authority.roots)


async def test_plaintext_and_tls_do_not_meet(authority):
    async with serving(authority.issue("server")) as address:
        assert "Socket closed" in await asked(address, None)
    async with serving(None) as address:
        assert "WRONG_VERSION_NUMBER" in await asked(address, authority.issue("client", roots=authority.roots))


async def test_with_roots_a_server_takes_those_alone_that_show_a_certificate_of_theirs(authority, stranger):
    async with serving(authority.issue("server", roots=authority.roots)) as address:
        assert await asked(address, authority.issue("client", "any.name", roots=authority.roots)) == 7
        assert "Socket closed" in await asked_without_certificate(address, authority.roots)
        assert "Socket closed" in await asked(address, stranger.issue("client", roots=authority.roots))


async def test_a_certificate_does_not_take_the_place_of_the_token(authority):
    files = authority.issue("both", roots=authority.roots)
    async with serving(files) as address, service_channel(address, files) as channel:
        stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.GetPlan(placement_service_pb2.GetPlanRequest(), timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def shown(address):
    """The certificate that a server shows to a new connection."""
    host, port = address.split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), timeout=20) as raw, context.wrap_socket(raw) as connection:
        return connection.getpeercert(binary_form=True)


def kept_in(files):
    first = files.certificate.read_text().split("-----END CERTIFICATE-----")[0]
    return ssl.PEM_cert_to_DER_cert(first + "-----END CERTIFICATE-----\n")


async def test_a_new_connection_is_shown_the_certificate_that_lies_there_now(authority):
    files = authority.issue("server")
    async with serving(files) as address:
        before = kept_in(files)
        assert await asyncio.to_thread(shown, address) == before
        authority.issue("server")
        assert kept_in(files) != before
        assert await asyncio.to_thread(shown, address) == kept_in(files)


async def test_a_pair_that_is_replaced_by_halves_or_broken_is_not_shown(authority):
    files = authority.issue("server")
    async with serving(files) as address:
        before = kept_in(files)
        key = files.key.read_bytes()
        with capture_logs() as logs:
            authority.issue("server")
            new_key = files.key.read_bytes()
            files.key.write_bytes(key)
            for _ in range(2):
                assert await asyncio.to_thread(shown, address) == before
            files.key.write_bytes(new_key[: len(new_key) // 2])
            assert await asyncio.to_thread(shown, address) == before
            files.key.unlink()
            assert await asyncio.to_thread(shown, address) == before
            files.key.write_bytes(new_key)
            assert await asyncio.to_thread(shown, address) == kept_in(files) != before
        told = [line["error"] for line in logs if line["log_level"] == "warning"]
        assert len(told) == 3, "once for each state of the files"
        assert "is not the key of the first certificate" in told[0]
        assert "holds no private key in PEM" in told[1]
        assert "No such file" in told[2]


async def test_roots_that_are_replaced_decide_who_may_call(authority, stranger):
    roots = authority.roots.with_name("callers.pem")
    roots.write_bytes(authority.roots.read_bytes())
    async with serving(authority.issue("server", roots=roots)) as address:
        new = stranger.issue("client", roots=authority.roots)
        assert "Socket closed" in await asked(address, new)
        roots.write_bytes(authority.roots.read_bytes() + stranger.roots.read_bytes())
        assert await asked(address, new) == 7


async def test_a_channel_shows_the_certificate_that_lies_there_now(authority, stranger):
    async with serving(authority.issue("server", roots=authority.roots)) as address:
        files = stranger.issue("client", roots=authority.roots)
        async with service_channel(address, files) as channel:
            assert "Socket closed" in await answer(channel)
            renewed = authority.issue("client")
            files.certificate.write_bytes(renewed.certificate.read_bytes())
            with capture_logs() as logs:
                assert "Socket closed" in await answer(channel)
            assert "is not the key" in logs[0]["error"]
            files.key.write_bytes(renewed.key.read_bytes())
            assert await answer(channel) == 7


async def test_a_stream_goes_on_when_its_channel_gets_another_certificate(authority):
    servicer = Placement()
    files = authority.issue("both", roots=authority.roots)
    async with serving(files, servicer) as address, service_channel(address, files) as channel:
        stub = placement_service_pb2_grpc.PlacementServiceStub(channel)
        watch = stub.WatchPlan(placement_service_pb2.WatchPlanRequest(), metadata=bearer_metadata(TOKEN), timeout=60)
        assert (await watch.read()).plan.revision == 1
        reading = asyncio.create_task(watch.read())
        await asyncio.sleep(0)
        authority.issue("both")
        before = channel._channel
        assert await answer(channel) == 7
        assert channel._channel is not before
        servicer.may_end.set()
        assert (await reading).plan.revision == 2
        assert await watch.read() is grpc.aio.EOF
        async with asyncio.timeout(20):
            while not before._channel.closed():
                await asyncio.sleep(0.01)


class Settings(ServiceSettings):
    prefix: ClassVar[str] = "ALTO_SAMPLE_"


@pytest.fixture
def load(monkeypatch):
    """A function from variables to what a service makes of them."""

    def load(**variables):
        monkeypatch.setenv("ALTO_SAMPLE_SERVICE_TOKEN", TOKEN)
        for name, value in variables.items():
            monkeypatch.setenv(f"ALTO_SAMPLE_{name.upper()}", str(value))
        return service_tls(Settings.load())

    return load


def variables_of(files):
    named = {"tls_certificate": files.certificate, "tls_key": files.key, "tls_roots": files.roots}
    return {name: path for name, path in named.items() if path is not None}


def test_settings_become_files(load, authority):
    assert load() is None
    files = authority.issue("service", roots=authority.roots)
    assert load(**variables_of(files)) == files


def test_a_key_is_in_no_representation(authority):
    assert "PRIVATE" not in repr(authority.issue("service").read())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["tls_certificate"], "ALTO_SAMPLE_TLS_CERTIFICATE is set without ALTO_SAMPLE_TLS_KEY: give both"),
        (["tls_key"], "ALTO_SAMPLE_TLS_KEY is set without ALTO_SAMPLE_TLS_CERTIFICATE: give both"),
        (["tls_roots"], "ALTO_SAMPLE_TLS_ROOTS is set without a certificate: give ALTO_SAMPLE_TLS_CERTIFICATE and"),
    ],
)
def test_one_setting_without_the_other_is_told(load, authority, given, told):
    variables = variables_of(authority.issue("service", roots=authority.roots))
    with pytest.raises(SettingsError, match=told):
        load(**{name: variables[name] for name in given})


@pytest.mark.parametrize("name", ["tls_certificate", "tls_key", "tls_roots"])
@pytest.mark.parametrize("content", [None, "", "nonsense", "folder"])
def test_a_file_that_is_not_what_it_should_be_is_told_by_its_variable(load, authority, tmp_path, name, content):
    variables = variables_of(authority.issue("service", roots=authority.roots))
    path = variables[name] = tmp_path / "wrong.pem"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError) as told:
        load(**variables)
    assert str(told.value).startswith(f"ALTO_SAMPLE_{name.upper()}: {path}")
    assert ": give " in str(told.value)


def test_files_that_are_mixed_up_are_told(load, authority):
    files = authority.issue("service")
    with pytest.raises(SettingsError, match=r"^ALTO_SAMPLE_TLS_CERTIFICATE: .*service.key holds no certificate in PEM"):
        load(tls_certificate=files.key, tls_key=files.certificate)
    with pytest.raises(SettingsError, match=r"^ALTO_SAMPLE_TLS_KEY: .*service.pem holds no private key in PEM"):
        load(tls_certificate=files.certificate, tls_key=files.certificate)


def test_a_key_of_another_certificate_is_told(load, authority):
    files, other = authority.issue("service"), authority.issue("other")
    with pytest.raises(SettingsError, match=r"^ALTO_SAMPLE_TLS_KEY: .*other.key is not the key of the first"):
        load(tls_certificate=files.certificate, tls_key=other.key)


def test_an_encrypted_key_is_told_and_nobody_is_asked_for_its_password(load, authority, tmp_path):
    files = authority.issue("service")
    encrypted = tmp_path / "encrypted.key"
    command = ["openssl", "pkey", "-in", files.key, "-aes128", "-passout", "pass:PASSWORD", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(SettingsError, match=r"^ALTO_SAMPLE_TLS_KEY: .*encrypted.key is encrypted: give .*"):
        load(tls_certificate=files.certificate, tls_key=encrypted)


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        (("RSA", "rsa_keygen_bits:2048"), True),
        (("RSA", "rsa_keygen_bits:1024"), False),
        (("EC", "ec_paramgen_curve:P-384"), True),
        (("EC", "ec_paramgen_curve:P-521"), False),
        (("ED25519",), False),
    ],
)
def test_a_key_of_a_kind_that_every_handshake_would_fail_with_is_told(load, tmp_path, kind, fits):
    algorithm, *options = kind
    key, certificate = tmp_path / "service.key", tmp_path / "service.pem"
    make = ["openssl", "genpkey", "-algorithm", algorithm, "-out", key]
    subprocess.run([*make, *(word for option in options for word in ("-pkeyopt", option))], check=True)
    sign = ["openssl", "req", "-x509", "-key", key, "-out", certificate, "-subj", "/CN=service"]
    subprocess.run(sign, check=True)
    if fits:
        assert load(tls_certificate=certificate, tls_key=key) is not None
        return
    with pytest.raises(SettingsError, match=r"^ALTO_SAMPLE_TLS_KEY: .*service.key is a key of a kind .*: make one"):
        load(tls_certificate=certificate, tls_key=key)


def test_a_setting_that_is_empty_is_not_given(load):
    assert load(tls_certificate="", tls_key="", tls_roots="") is None


async def test_a_server_does_not_begin_with_files_that_cannot_be_used(authority):
    files = replace(authority.issue("server"), key=authority.issue("other").key)
    with pytest.raises(TlsError, match="is not the key of the first certificate"):
        Server("127.0.0.1:0", ServiceTokenAuthenticator(TOKEN), {}, [SERVICE], tls=files)


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:7410", True),
        ("127.1.2.3:0", True),
        ("[::1]:7410", True),
        ("localhost:7410", True),
        ("unix:/run/alto.sock", True),
        ("0.0.0.0:7410", False),
        ("[::]:7410", False),
        ("10.0.0.7:7410", False),
        ("node-7.example:7410", False),
        ("unix.example:7410", False),
        (":7410", False),
    ],
)
def test_which_addresses_others_can_come_to(listen, expected):
    assert is_loopback(listen) is expected


async def started(listen, tls):
    server = Server(listen, ServiceTokenAuthenticator(TOKEN), {}, [SERVICE], tls=tls)
    with capture_logs() as logs:
        await server.start()
        await server.stop(0)
    return [line for line in logs if line["log_level"] == "warning"]


async def test_a_server_that_others_can_come_to_in_plaintext_says_so_once(authority):
    assert await started("127.0.0.1:0", None) == []
    assert await started("0.0.0.0:0", authority.issue("server")) == []
    [warning] = await started("0.0.0.0:0", None)
    assert "API keys" in warning["event"]
    assert warning["listen"] == "0.0.0.0:0"
    assert "TLS_CERTIFICATE" in warning["cure"]
