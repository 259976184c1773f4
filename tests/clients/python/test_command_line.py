import json
import os
import subprocess
import sys
import time
from concurrent import futures
from importlib.metadata import version

import grpc
import pytest
from alto.v1 import admission_service_pb2 as messages
from alto.v1 import error_pb2, placement_pb2, placement_service_pb2, tuning_pb2
from alto.v1.placement_service_pb2_grpc import PlacementServiceServicer, add_PlacementServiceServicer_to_server
from alto_cli.app import app
from alto_cli.client_file import ClientFile
from alto_common.errors import DomainError, invalid_fields
from alto_common.violations import Violation
from typer.testing import CliRunner

TASK_FILE = "base_model: tiny\ndataset: train.jsonl\nsearch: {grid: {lora_rank: [4, 8]}}\noutput: best\n"


@pytest.fixture
def local(address, own_home):
    """The file that `alto up` leaves."""
    own_home.mkdir()
    ClientFile(address, "alto_test_key", address, "service-token").save(own_home)


@pytest.fixture
def run(local):
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, arguments)


@pytest.fixture
def task_file(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "task.yaml").write_text(TASK_FILE)
    return tmp_path / "task.yaml"


def test_help_names_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("tune", "watch", "stop-trial", "train-local", "up", "plan", "dataset", "models"):
        assert f"\n  {command} " in result.output
    # Each command has its whole sentence: nothing is cut off.
    assert "..." not in result.output.partition("Commands:")[2]


def test_the_version_is_the_packages():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"alto {version('alto-tuning')}\n"


def test_help_loads_nothing_slow():
    program = "import sys; from alto_cli import app; print(*(m for m in sys.modules))"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"grpc", "rich", "pydantic", "yaml", "google.protobuf", "torch", "numpy"} & set(modules)


def test_tune_goes_the_whole_way_in_plain_lines(run, admission, task_file):
    admission.adapter_files = {"adapter_config.json": b"{}"}
    admission.snapshot.task.best_trial_id = "trial-002"
    result = run("tune", str(task_file))
    assert result.exit_code == 0, result.stderr
    assert "submitted task-1: 2 trials over tiny" in result.stderr
    assert "trial-001 stopped by paper (underperformance): 1.9 is number 2 of 2" in result.stdout
    assert f"lies in {task_file.parent / 'best'}" in result.stdout
    assert "\x1b" not in result.stdout
    assert (task_file.parent / "best" / "adapter_config.json").exists()


def test_an_output_that_cannot_be_a_folder_is_said_before_anything_is_sent(run, admission, task_file):
    result = run("tune", str(task_file), "--output", str(task_file))
    assert result.exit_code == 2
    assert "task.yaml is a file" in result.stderr
    assert not admission.requests


def test_an_adapter_that_could_not_be_fetched_can_be_fetched_later(run, admission, task_file):
    admission.adapter_files = {"adapter_config.json": b"{}"}
    admission.snapshot.task.best_trial_id = "trial-002"
    admission.corrupt_downloads = 9
    result = run("tune", str(task_file))
    assert result.exit_code == 1
    assert "alto download task-1 --output FOLDER" in result.stderr


def test_watch_in_json_is_lines_of_json_and_nothing_else(run, admission):
    result = run("watch", "task-1", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"]["sequence"] for line in lines if "event" in line] == list(range(1, 14))
    assert lines[0]["snapshot"]["task"]["task_id"] == "task-1"
    assert lines[-1]["result"]["task"]["task_id"] == "task-1"
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("state", "code"),
    [(tuning_pb2.TASK_STATE_SUCCEEDED, 0), (tuning_pb2.TASK_STATE_FAILED, 1), (tuning_pb2.TASK_STATE_CANCELLED, 8)],
)
def test_the_exit_code_of_watch_tells_how_the_task_ended(run, admission, state, code):
    admission.snapshot.task.state = state
    admission.events = []
    assert run("watch", "task-1").exit_code == code


def test_submit_prints_the_id_alone_on_stdout(run, task_file):
    result = run("submit", str(task_file))
    assert result.stdout == "task-1\n"
    assert "alto watch task-1" in result.stderr


def test_the_other_commands_answer(run, admission, task_file):
    assert "task-5" in run("list").stdout
    assert json.loads(run("list", "--json", "--limit", "1").stdout)["tasks"][0]["task_id"] == "task-1"
    assert "running" in run("show", "task-1").stdout
    assert "trial-002" in run("trials", "task-1").stdout
    assert "cancelling" in run("cancel", "task-1").stderr
    assert "prior, never measured" in run("estimate", str(task_file)).stdout
    assert json.loads(run("estimate", str(task_file), "--json").stdout)["samples_planned"] == 800
    listed = run("dataset", "list")
    assert "dataset-1" in listed.stdout
    assert listed.stderr == "14 B of 1.0 GiB used\n"


def test_a_bad_task_file_is_told_line_by_line_before_anything_is_sent(run, admission, task_file):
    task_file.write_text(TASK_FILE.replace("[4, 8]", "[0]").replace("tiny", "[]"))
    result = run("tune", str(task_file))
    assert result.exit_code == 2
    assert f"{task_file}:1: base_model" in result.stderr
    assert not admission.requests


def test_a_refusal_names_field_value_and_cure(run, admission, task_file):
    admission.error = DomainError(
        error_pb2.ERROR_REASON_UNKNOWN_BASE_MODEL,
        "spec.base_model = 'tiny': give one of: smollm2",
        violations=[Violation("spec.base_model", "tiny", "give one of: smollm2")],
    )
    result = run("estimate", str(task_file))
    assert result.exit_code == 2
    assert result.stderr == "error: base_model = 'tiny': give one of: smollm2\n"
    result = run("estimate", str(task_file), "--json")
    assert result.stdout == ""
    assert json.loads(result.stderr)["error"]["reason"] == "UNKNOWN_BASE_MODEL"


RANK = Violation("lora_rank", 64, "give at most 16")
LENGTH = Violation("max_length", 640, "give at most 64 tokens")
MANY = f"give one of: {', '.join(f'model-{number:03}' for number in range(90))}"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (invalid_fields([RANK]), ["lora_rank = 64: give at most 16"]),
        (
            invalid_fields([RANK, LENGTH]),
            ["lora_rank = 64: give at most 16 (and 1 more)", "  max_length = 640: give at most 64 tokens"],
        ),
        (
            DomainError(
                error_pb2.ERROR_REASON_UNKNOWN_BASE_MODEL,
                "base model 'tiny' is not known: give one of: smollm2",
                violations=[Violation("spec.base_model", "tiny", "give one of: smollm2")],
            ),
            ["base model 'tiny' is not known: give one of: smollm2"],
        ),
        (
            DomainError(
                error_pb2.ERROR_REASON_QUOTA_EXCEEDED,
                "5 tasks have not ended; the quota is 5 tasks at a time",
                quota=("tenant:local", "5 tasks at a time"),
                retry_after_s=30,
            ),
            ["5 tasks have not ended; the quota is 5 tasks at a time", "  try again in 30 s"],
        ),
        (
            DomainError(
                error_pb2.ERROR_REASON_RESUME_TOKEN_INVALID,
                "the resume token is not of this task",
                violations=[Violation("resume_token", "zzz", "give that of the last message")],
            ),
            ["the resume token is not of this task", "  resume_token = 'zzz': give that of the last message"],
        ),
    ],
)
def test_what_a_refusal_says_it_says_once(run, admission, error, said):
    admission.error = error
    assert run("show", "task-1").stderr == "\n".join([f"error: {said[0]}", *said[1:], ""])


@pytest.mark.parametrize("command", ["submit", "estimate", "tune"])
def test_whoever_wrote_a_task_file_is_told_of_its_keys(run, admission, task_file, command):
    found = Violation("spec.search_space.grid.dimensions[lora_rank]", 64, "give at most 48")
    admission.error = invalid_fields([found])
    result = run(command, str(task_file))
    assert result.stderr.endswith("error: search.grid.lora_rank = 64: give at most 48\n")
    result = run(command, str(task_file), "--json")
    (violation,) = json.loads(result.stderr.splitlines()[-1])["error"]["violations"]
    assert violation["field"] == found.field


def test_unfinished_uploads_are_listed_with_what_gives_them_up(run, admission):
    upload = messages.UnfinishedUpload(dataset_id="dataset-7", request_id="u", size_bytes=3 << 20)
    upload.update_time.FromSeconds(1_700_000_000)
    admission.unfinished_uploads = [upload]
    result = run("dataset", "list")
    assert "taking 3.0 MiB" in result.stderr
    assert "alto dataset delete dataset-7" in result.stderr
    (shown,) = json.loads(run("dataset", "list", "--json").stdout)["usage"]["unfinished_uploads"]
    assert shown["dataset_id"] == "dataset-7"


@pytest.mark.parametrize("others", [[], [RANK]])
def test_a_long_refusal_whose_middle_the_server_left_out_is_said_once(run, admission, others):
    violation = Violation("spec.base_model", "tiny", MANY)
    admission.error = invalid_fields([violation, *others])
    assert run("show", "task-1").stderr.count("model-001") == 1
    admission.error = DomainError(
        error_pb2.ERROR_REASON_UNKNOWN_BASE_MODEL, f"'tiny' is not known: {MANY}", violations=[violation]
    )
    assert run("show", "task-1").stderr.count("model-001") == 1


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (error_pb2.ERROR_REASON_RESOURCE_NOT_FOUND, 3),
        (error_pb2.ERROR_REASON_STATE_CONFLICT, 4),
        (error_pb2.ERROR_REASON_PERMISSION_DENIED, 5),
        (error_pb2.ERROR_REASON_QUOTA_EXCEEDED, 6),
        (error_pb2.ERROR_REASON_INTERNAL, 1),
    ],
)
def test_exit_codes_mean_something(run, admission, reason, code):
    admission.error = DomainError(reason, "why")
    result = run("show", "task-1")
    assert result.exit_code == code
    assert "error: why" in result.stderr


def test_an_unknown_state_is_the_users_mistake(run):
    result = run("list", "--state", "sleeping")
    assert result.exit_code == 2
    assert "known are queued, running" in result.stderr


def test_without_a_server_the_cure_is_named():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 7
    assert "alto up" in result.stderr


def test_the_local_key_is_not_sent_to_another_server(run):
    result = run("list", "--server", "elsewhere.example:7410")
    assert result.exit_code == 5
    assert "no API key for elsewhere.example:7410" in result.stderr


def test_a_server_that_is_gone_is_told_with_the_cure(own_home):
    own_home.mkdir()
    ClientFile("127.0.0.1:1", "key", "127.0.0.1:1", "token").save(own_home)
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 7
    assert "cannot reach 127.0.0.1:1" in result.stderr
    assert "alto status" in result.stderr


def test_the_client_file_is_readable_by_its_owner_alone(local, own_home):
    assert os.stat(own_home / "client.json").st_mode & 0o777 == 0o600


def test_dataset_check_names_the_lines_that_are_not_sound(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\nnot json\n')
    result = CliRunner().invoke(app, ["dataset", "check", str(path)])
    assert result.exit_code == 2
    assert "line[2]" in result.stderr
    assert "line[3]" in result.stderr
    path.write_text('{"text": "a"}\n')
    assert json.loads(CliRunner().invoke(app, ["dataset", "check", str(path), "--json"]).stdout)["rows"] == 1


class MemoryPlacement(PlacementServiceServicer):
    """A plan with one waiting task."""

    def WatchPlan(self, request, context):
        assert ("authorization", "Bearer service-token") in context.invocation_metadata()
        task = placement_pb2.PlannedTask(
            task_id="task-1",
            tenant="local",
            state=placement_pb2.PLACEMENT_STATE_WAITING,
            queue={"reason": "GPUS_BUSY", "explanation": "Every place that could hold it is in use."},
        )
        ended = placement_pb2.PlannedTask(task_id="task-0", state=placement_pb2.PLACEMENT_STATE_FINISHED)
        first = placement_pb2.Plan(revision=1, tasks=[ended, task], makespan={"seconds": 60})
        for plan in (first, placement_pb2.Plan(revision=2)):
            yield placement_service_pb2.WatchPlanResponse(plan=plan)

    def CordonNode(self, request, context):
        state = placement_pb2.NODE_STATE_CORDONED if request.cordoned else placement_pb2.NODE_STATE_READY
        return placement_service_pb2.CordonNodeResponse(node=placement_pb2.Node(node_id=request.node_id, state=state))

    def ListNodes(self, request, context):
        node = placement_pb2.Node(node_id="n1", gpu_kind="cpu", gpus=1, state=placement_pb2.NODE_STATE_READY)
        rest = placement_pb2.NodeRest(failures=2, message="its disk is full")
        rest.until_time.FromSeconds(int(time.time()) + 600)
        resting = placement_pb2.Node(node_id="n2", state=placement_pb2.NODE_STATE_RESTING, rest=rest)
        return placement_service_pb2.ListNodesResponse(nodes=[node, resting])

    def DrainNode(self, request, context):
        node = placement_pb2.Node(node_id=request.node_id, state=placement_pb2.NODE_STATE_DRAINING)
        return placement_service_pb2.DrainNodeResponse(node=node)


@pytest.fixture
def memory_placement():
    """A server without a port yet."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    add_PlacementServiceServicer_to_server(MemoryPlacement(), server)
    yield server
    server.stop(None).wait()


@pytest.fixture
def placement(memory_placement, own_home):
    """The placement of `alto up`; its address."""
    address = f"127.0.0.1:{memory_placement.add_insecure_port('127.0.0.1:0')}"
    memory_placement.start()
    own_home.mkdir()
    ClientFile("127.0.0.1:1", "key", address, "service-token").save(own_home)
    return address


def test_the_operators_commands(placement):
    runner = CliRunner()
    shown = runner.invoke(app, ["plan"]).stdout
    assert "Every place that could hold it" in shown
    assert "task-0" not in shown
    watched = runner.invoke(app, ["plan", "--watch", "--json"]).stdout.splitlines()
    assert [json.loads(line)["revision"] for line in watched] == [1, 2]
    nodes = runner.invoke(app, ["nodes"])
    assert "n1" in nodes.stdout
    assert "resting" in nodes.stdout
    assert "n2 rests and takes work again in " in nodes.stderr
    assert "because 2 attempts in a row failed there before the first step: its disk is full" in nodes.stderr
    assert "draining" in runner.invoke(app, ["drain", "n1"]).stderr
    assert "cordoned" in runner.invoke(app, ["cordon", "n1"]).stderr
    assert "ready" in runner.invoke(app, ["uncordon", "n1"]).stderr


OPERATORS = (["plan"], ["nodes"], ["drain", "n1"], ["cordon", "n1"], ["uncordon", "n1"])


def test_the_operators_commands_take_another_placement(placement, own_home, monkeypatch):
    (own_home / "client.json").unlink()
    run = CliRunner().invoke
    unknown = run(app, ["nodes"])
    assert unknown.exit_code == 7
    assert "ALTO_PLACEMENT and ALTO_SERVICE_TOKEN" in unknown.stderr
    without = run(app, ["nodes", "--placement", placement])
    assert without.exit_code == 5
    assert f"no service token for {placement}" in without.stderr
    for command in OPERATORS:
        assert run(app, [*command, "--placement", placement, "--service-token", "service-token"]).exit_code == 0
    monkeypatch.setenv("ALTO_PLACEMENT", placement)
    monkeypatch.setenv("ALTO_SERVICE_TOKEN", "another")
    assert run(app, ["plan"]).exit_code != 0
    monkeypatch.setenv("ALTO_SERVICE_TOKEN", "service-token")
    for command in OPERATORS:
        assert run(app, command).exit_code == 0


def test_the_operators_commands_show_a_certificate(memory_placement, authority, own_home, monkeypatch):
    files, mine = authority.issue("placement"), authority.issue("operator")
    pairs = [(files.key.read_bytes(), files.certificate.read_bytes())]
    roots = authority.roots.read_bytes()
    credentials = grpc.ssl_server_credentials(pairs, root_certificates=roots, require_client_auth=True)
    port = memory_placement.add_secure_port("127.0.0.1:0", credentials)
    memory_placement.start()
    run = CliRunner().invoke
    there = ["--placement", f"https://127.0.0.1:{port}", "--service-token", "service-token"]
    there += ["--root-certificates", str(authority.roots)]
    pair = ["--client-certificate", str(mine.certificate), "--client-key", str(mine.key)]
    for command in OPERATORS:
        assert run(app, [*command, *there, *pair]).exit_code == 0
    without = run(app, ["nodes", *there])
    assert without.exit_code == 7
    assert "--client-certificate and --client-key" in without.stderr
    monkeypatch.setenv("ALTO_CLIENT_CERTIFICATE", str(mine.certificate))
    half = run(app, ["nodes", *there])
    assert half.exit_code == 2
    assert "--client-certificate and --client-key, or ALTO_CLIENT_CERTIFICATE and ALTO_CLIENT_KEY" in half.stderr
    monkeypatch.setenv("ALTO_CLIENT_KEY", str(mine.key))
    assert run(app, ["nodes", *there]).exit_code == 0
    missing = run(app, ["nodes", *there, "--client-key", str(own_home / "none.key")])
    assert missing.exit_code == 2
    assert "none.key: No such file" in missing.stderr
    plaintext = run(app, ["nodes", "--placement", f"http://127.0.0.1:{port}", "--service-token", "service-token"])
    assert plaintext.exit_code == 2
    assert "http:// is not" in plaintext.stderr
