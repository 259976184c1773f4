"""The worker process, the command line of keys, and settings."""

import asyncio
import os
import signal

import pytest
from alto.v1 import error_pb2
from alto_admission.__main__ import main
from alto_admission.api_keys import KeyAuthenticator
from alto_admission.server import clock_us, open_database
from alto_admission.settings import AdmissionSettings
from alto_admission.store.keys import KeyStore
from alto_admission.worker import Worker
from alto_common.errors import DomainError
from alto_common.rpc.authentication import Scope
from processes import taken_address, why_it_does_not_start


async def test_a_worker_that_dies_is_started_again():
    worker = Worker("test")
    first = await worker.call(os.getpid)
    assert first not in (os.getpid(), 0)
    dying = asyncio.ensure_future(worker.call(signal.pause))
    await asyncio.sleep(0.1)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(DomainError) as caught:
        await dying
    assert caught.value.reason == error_pb2.ERROR_REASON_UNAVAILABLE
    assert await worker.call(os.getpid) != first
    worker.close()


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ALTO_ADMISSION_SERVICE_TOKEN", "t")
    monkeypatch.setenv("ALTO_ADMISSION_DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path / 'new' / 'a.db'}")


def test_keys_need_the_database_only(database_url, monkeypatch, capsys):
    monkeypatch.delenv("ALTO_ADMISSION_SERVICE_TOKEN", raising=False)
    monkeypatch.setenv("ALTO_ADMISSION_DATABASE_URL", database_url)
    assert main(["keys", "create", "--tenant", "acme"]) == 0
    key_id, _ = capsys.readouterr().out.split()
    assert main(["keys", "list"]) == 0
    assert capsys.readouterr().out.startswith(f"{key_id}\tacme\t")
    assert main(["keys", "revoke", "--tenant", "acme", "--key", key_id]) == 0
    with pytest.raises(ValueError, match="ALTO_ADMISSION_SERVICE_TOKEN"):
        AdmissionSettings.load()


def test_keys_are_made_listed_and_revoked(environment, capsys):
    async def scopes_of(secret):
        database = open_database(AdmissionSettings.load())
        try:
            caller = await KeyAuthenticator(KeyStore(database), clock_us).authenticate(secret)
            return caller.tenant, caller.scopes
        finally:
            await database.close()

    assert main(["keys", "create", "--tenant", "acme", "--scopes", "read", "--days", "1"]) == 0
    key_id, secret = capsys.readouterr().out.split()
    assert asyncio.run(scopes_of(secret)) == ("acme", frozenset({Scope.READ}))
    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert key_id in listed
    assert secret not in listed
    assert main(["keys", "revoke", "--tenant", "acme", "--key", key_id]) == 0
    with pytest.raises(DomainError, match="not known"):
        asyncio.run(scopes_of(secret))


@pytest.mark.parametrize("wrong", [["--tenant", "../x"], ["--tenant", "a", "--scopes", "service"], ["--tenant", ""]])
def test_a_key_that_cannot_be(environment, capsys, wrong):
    assert main(["keys", "create", *wrong]) == 2
    assert "give" in capsys.readouterr().err


@pytest.mark.parametrize("days", ["nan", "1e300", "-1", "0"])
def test_a_key_lasts_for_a_number_of_days_that_can_be(environment, capsys, days):
    with pytest.raises(SystemExit, match="2"):
        main(["keys", "create", "--tenant", "acme", "--days", days])
    assert "above 0" in capsys.readouterr().err


def test_folders_of_models_are_separated_by_either_mark(environment, monkeypatch):
    monkeypatch.setenv("ALTO_ADMISSION_MODEL_FOLDERS", f"/a,/b{os.pathsep}/c")
    assert [str(folder) for folder in AdmissionSettings.load().allowed_folders] == ["/a", "/b", "/c"]


def test_an_unknown_setting_is_refused(environment, monkeypatch):
    monkeypatch.setenv("ALTO_ADMISSION_LISTENS", "x")
    with pytest.raises(ValueError, match="ALTO_ADMISSION_LISTENS"):
        AdmissionSettings.load()


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("DATABASE_URL", "postgresql://alto:PASSWORD@127.0.0.1:1/alto", "Connection refused: start the database"),
        ("DATABASE_URL", "postgresql://alto:in@PASSWORD@127.0.0.1:1/alto", "write an @ inside a user name or a passw"),
        ("DATABASE_URL", "sqlite+aiosqlite:///{file}/a.db", "{file}: File exists: start the database"),
        ("DATABASE_URL", "PASSWORD", "Could not parse SQLAlchemy URL"),
        ("ARTIFACT_ROOT", "{file}/artifacts", "{file}/artifacts: Not a directory: name a folder that can be written"),
        ("ARTIFACT_ROOT", "nowhere://bucket", "Protocol not known: nowhere: give a folder, or a URL"),
        ("UPLOAD_FOLDER", "{file}", "{file}: File exists: name a folder that can be written"),
        ("LOCAL_KEY_FILE", "{file}/key", "{file}: File exists: name a file that can be written"),
        ("LISTEN", "{taken}", "cannot listen on '{taken}': give host:port"),
        ("INTERNAL_LISTEN", "{taken}", "cannot listen on '{taken}': give host:port"),
        ("LOG_FORMAT", "xml", "Input should be 'json' or 'text'"),
    ],
)
def test_why_it_cannot_start_is_its_last_line_with_the_setting_and_the_cure(tmp_path, setting, value, said):
    file = tmp_path / "file"
    file.touch()
    with taken_address() as taken:
        settings = {"SERVICE_TOKEN": "t", "LISTEN": "127.0.0.1:0", "INTERNAL_LISTEN": "127.0.0.1:0"}
        settings[setting] = value.format(file=file, taken=taken)
        named = {f"ALTO_ADMISSION_{name}": value for name, value in settings.items()}
        last = why_it_does_not_start("alto_admission", tmp_path / "home", named)
    assert last.startswith(f"alto-admission: ALTO_ADMISSION_{setting}: ")
    assert said.format(file=file, taken=taken) in last
