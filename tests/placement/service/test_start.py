"""alto-placement as a process: why it cannot start is its last line, with the setting and the cure."""

import pytest
from processes import taken_address, why_it_does_not_start


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("DATABASE_URL", "postgresql://alto:PASSWORD@127.0.0.1:1/alto", "Connection refused: start the database"),
        ("DATABASE_URL", "sqlite+aiosqlite:///{file}/a.db", "{file}: File exists: start the database"),
        ("DATABASE_URL", "PASSWORD", "Could not parse SQLAlchemy URL"),
        ("LISTEN", "{taken}", "cannot listen on '{taken}': give host:port"),
        ("LOG_FORMAT", "xml", "Input should be 'json' or 'text'"),
    ],
)
def test_why_it_cannot_start_is_its_last_line_with_the_setting_and_the_cure(tmp_path, setting, value, said):
    file = tmp_path / "file"
    file.touch()
    with taken_address() as taken:
        settings = {"SERVICE_TOKEN": "t", "LISTEN": "127.0.0.1:0", setting: value.format(file=file, taken=taken)}
        named = {f"ALTO_PLACEMENT_{name}": value for name, value in settings.items()}
        last = why_it_does_not_start("alto_placement", tmp_path / "home", named)
    assert last.startswith(f"alto-placement: ALTO_PLACEMENT_{setting}: ")
    assert said.format(file=file, taken=taken) in last
