"""Traces: what is read, and what is said of one that cannot be."""

from pathlib import Path

import pytest
from alto_placement.simulator import TraceError, read_trace, scaled_to_load

HEAD = "job,submit_s,gpus,duration_s,vc\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_jobs_come_by_submission_and_those_that_did_nothing_are_left_out(tmp_path: Path) -> None:
    jobs = read_trace(written(tmp_path, HEAD + "b,7,2,60,x\na,5,1,30.5,y\nnone,6,0,10,x\nshort,6,1,0,x\n"))
    assert [(job.job_id, job.submit_s, job.gpus, job.actual_s, job.tenant) for job in jobs] == [
        ("a", 5.0, 1, 30.5, "y"),
        ("b", 7.0, 2, 60.0, "x"),
    ]
    scaled = scaled_to_load(jobs, gpus=1, load=0.5)
    assert sum(job.gpus * job.actual_s for job in scaled) == pytest.approx(0.5 * scaled[-1].submit_s)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no column job"),
        ("job,submit_s,gpus,duration_s\n", "no column vc"),
        (HEAD, "no job that ran"),
        (HEAD + "a,0,1,30,x\nb,0,two,30,x\n", "line 3: gpus is 'two'"),
        (HEAD + "a,0,1.5,30,x\n", "line 2: gpus is 1.5: give whole GPUs"),
        (HEAD + "a,0,1,nan,x\n", "line 2: duration_s is 'nan'"),
        (HEAD + "a,-3,1,30,x\n", "line 2: submit_s is '-3'"),
        (HEAD + "a,0\n", "line 2: gpus is None"),
        (HEAD + ",0,1,30,x\n", "line 2: no job"),
        (HEAD + "a,0,1,30,x\na,1,1,30,x\n", "line 3: job 'a' is there twice"),
    ],
)
def test_what_is_wrong_is_said_with_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        read_trace(written(tmp_path, text))


def test_a_mark_of_utf_8_is_passed_over_and_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(f"{HEAD}a,0,1,30,x\n".encode("utf-8-sig"))
    assert read_trace(path)[0].job_id == "a"
    path.write_bytes(f"{HEAD}\u00e4,0,1,30,x\n".encode("latin-1"))
    with pytest.raises(TraceError, match="UTF-8"):
        read_trace(path)


def test_jobs_that_all_come_at_once_have_no_load(tmp_path: Path) -> None:
    jobs = read_trace(written(tmp_path, HEAD + "a,4,1,30,x\nb,4,1,30,x\n"))
    with pytest.raises(TraceError, match="submit_s differ"):
        scaled_to_load(jobs, gpus=8, load=0.9)
