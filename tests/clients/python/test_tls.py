"""What people are told when a client and a server do not agree about TLS, over real sockets."""

from concurrent import futures
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from alto.v1.admission_service_pb2 import ListBaseModelsRequest
from alto.v1.admission_service_pb2_grpc import AdmissionServiceStub, add_AdmissionServiceServicer_to_server
from alto_cli.app import app
from alto_cli.client_file import ClientFile
from alto_client import AltoClient, AltoError
from alto_client.connection import Connection
from alto_client.errors import HandshakeError
from typer.testing import CliRunner

from .conftest import API_KEY


@contextmanager
def serving(servicer, files):
    """Serve over TLS with these files; give the address."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    add_AdmissionServiceServicer_to_server(servicer, server)
    pair = files.key.read_bytes(), files.certificate.read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def secured(admission, authority):
    """The address of a service over TLS."""
    with serving(admission, authority.issue("server")) as address:
        yield address


def failure(address, roots=None):
    with AltoClient(address, API_KEY, root_certificates=roots) as client, pytest.raises(AltoError) as caught:
        client.get_task("task-1")
    assert caught.value.reason_name == "UNAVAILABLE"
    return caught.value


@pytest.mark.parametrize("scheme", ["https://", ""])
def test_with_the_right_roots_all_is_well(secured, authority, scheme):
    with AltoClient(scheme + secured, API_KEY, root_certificates=authority.roots.read_bytes()) as client:
        assert client.get_task("task-1").task_id == "task-1"


def test_a_certificate_that_nobody_known_has_signed(secured, stranger):
    for error in (failure(f"https://{secured}"), failure(secured, stranger.roots.read_bytes())):
        assert error.message.startswith(f"{secured} shows a certificate that is not trusted here (unable to get ")
        assert "give that authority's certificate" in error.message
        assert not error.is_connection_loss


def test_a_certificate_that_is_out_of_date(admission, authority):
    yesterday = datetime.now(UTC) - timedelta(days=1)
    with serving(admission, authority.issue("server", not_after=yesterday)) as address:
        error = failure(address, authority.roots.read_bytes())
    assert "(certificate has expired): who runs the server must renew it" in error.message


def test_a_certificate_for_another_name(admission, authority):
    with serving(admission, authority.issue("server", "alto.example")) as address:
        error = failure(address, authority.roots.read_bytes())
    assert error.message == f"{address} shows a certificate for other names: name it as its certificate does"


def test_a_server_that_speaks_plaintext(address):
    error = failure(f"https://{address}")
    assert error.message.startswith(f"{address} does not speak TLS: name it without https://")
    assert not error.is_connection_loss


def test_plaintext_to_a_server_that_speaks_tls(secured, authority):
    error = failure(secured)
    assert f"cannot reach {secured}" in error.message
    assert f"if it speaks TLS, name it https://{secured}" in error.message
    assert "https" not in failure("127.0.0.1:1").message
    # Written out, plaintext is what is meant.
    assert "https" in failure(f"http://{secured}", authority.roots.read_bytes()).message


def test_an_upload_does_not_wait_for_a_certificate_to_become_another(secured, tmp_path, monkeypatch):
    def wait(_seconds):
        raise AssertionError("another attempt fails as this one did")

    monkeypatch.setattr("alto_client.backoff.sleep", wait)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    with (
        AltoClient(f"https://{secured}", API_KEY) as client,
        pytest.raises(AltoError, match="is not trusted here"),
    ):
        client.upload_dataset(rows)


@pytest.mark.parametrize("content", [b"", b"nonsense", "Autorit\u00e9".encode(), b"\x30\x82\x01\x0a\x02\xff"])
def test_roots_that_are_none(content):
    with pytest.raises(ValueError, match="no certificate in PEM"):
        AltoClient("https://127.0.0.1:1", API_KEY, root_certificates=content)


def test_roots_may_have_comments_and_the_scheme_capitals(secured, authority):
    roots = "# Autorit\u00e9 priv\u00e9e\n".encode() + authority.roots.read_bytes()
    with AltoClient(f"HTTPS://{secured}", API_KEY, root_certificates=roots) as client:
        assert client.get_task("task-1").task_id == "task-1"


def test_a_certificate_of_the_callers_own_is_for_tls(secured, authority):
    files = authority.issue("operator")
    pair = files.certificate.read_bytes(), files.key.read_bytes()
    with pytest.raises(HandshakeError, match="is not trusted here"):
        list_models(Connection(secured, "token", client_certificate=pair))
    with pytest.raises(ValueError, match="http:// is not"):
        Connection("http://127.0.0.1:1", "token", client_certificate=pair)
    mixed_up = pair[0], authority.issue("other").key.read_bytes()
    with pytest.raises(HandshakeError, match="give PEM, a chain and the key"):
        list_models(Connection(secured, "token", client_certificate=mixed_up))


def list_models(connection):
    stub = AdmissionServiceStub(connection.channel)
    return connection.call(stub.ListBaseModels, ListBaseModelsRequest())


def test_the_command_takes_roots_as_an_option_or_a_variable(secured, authority, monkeypatch):
    run = CliRunner().invoke
    server = ("--server", f"https://{secured}", "--api-key", API_KEY)
    refused = run(app, ["show", "task-1", *server])
    assert refused.exit_code == 7
    assert "--root-certificates FILE or ALTO_ROOT_CERTIFICATES" in refused.stderr
    assert "is it running?" not in refused.stderr
    assert run(app, ["show", "task-1", *server, "--root-certificates", str(authority.roots)]).exit_code == 0
    monkeypatch.setenv("ALTO_ROOT_CERTIFICATES", str(authority.roots))
    for command in (["list"], ["trials", "task-1"], ["why", "task-1"], ["dataset", "list"]):
        assert run(app, [*command, *server]).exit_code == 0, command


def test_the_command_says_which_file_holds_no_roots(tmp_path):
    file = tmp_path / "roots.pem"
    arguments = ["list", "--server", "https://127.0.0.1:1", "--api-key", "k", "--root-certificates", str(file)]
    missing = CliRunner().invoke(app, arguments)
    assert missing.exit_code == 2
    assert f"{file}: No such file" in missing.stderr
    file.write_text("nonsense")
    nonsense = CliRunner().invoke(app, arguments)
    assert nonsense.exit_code == 2
    assert f"{file}: no certificate in PEM" in nonsense.stderr


def test_the_server_of_alto_up_is_in_plaintext_whatever_roots_there_are(address, own_home, authority, monkeypatch):
    own_home.mkdir()
    ClientFile(address, API_KEY, "127.0.0.1:1", "token").save(own_home)
    monkeypatch.setenv("ALTO_ROOT_CERTIFICATES", str(authority.roots))
    assert CliRunner().invoke(app, ["list"]).exit_code == 0


def test_alto_up_does_not_begin_with_settings_for_tls(monkeypatch):
    monkeypatch.setenv("ALTO_NODE_TLS_KEY", "k.pem")
    monkeypatch.setenv("ALTO_ADMISSION_PUBLIC_TLS_CERTIFICATE", "c.pem")
    refused = CliRunner().invoke(app, ["up"])
    assert refused.exit_code == 2
    assert "ALTO_ADMISSION_PUBLIC_TLS_CERTIFICATE, ALTO_NODE_TLS_KEY" in refused.stderr
