"""Where settings come from, and that secrets stay secret."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest

from ci_platform.errors import InvalidInputError
from ci_platform.settings import Settings, load_settings, make_data_folder, read_secret, write_secret

MEBIBYTE = 1024 * 1024


def test_every_setting_has_a_help_line_and_a_default() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
    assert [name for name, field in Settings.model_fields.items() if field.is_required()] == []


def test_an_option_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    (tmp_path / "dynflow.toml").write_text('port = 1\nhost = "file"\nstatus_context = "file"\n')
    environ = {"DYNFLOW_DATA": str(tmp_path), "DYNFLOW_PORT": "2", "DYNFLOW_HOST": "environment"}
    settings = load_settings({"port": 3, "public_url": None}, environ)
    found = (settings.port, settings.host, settings.status_context, settings.public_read)
    assert found == (3, "environment", "file", False)


def test_durations_and_sizes_are_written_as_people_write_them(tmp_path: Path) -> None:
    environ = {
        "DYNFLOW_RUN_TIMEOUT": "90 minutes",
        "DYNFLOW_GITHUB_TIMEOUT": "2.5",
        "DYNFLOW_MAX_BODY": "3 MB",
        "DYNFLOW_MAX_LOG": "4096",
    }
    settings = load_settings({"data": tmp_path}, environ)
    assert (settings.run_timeout, settings.github_timeout) == (timedelta(minutes=90), timedelta(seconds=2.5))
    assert (settings.max_body, settings.max_log) == (3 * MEBIBYTE, 4096)


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    settings = load_settings({"data": tmp_path}, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"DYNFLOW_PORT": "many"}, "port"),
        ({"DYNFLOW_PORT": "70000"}, "port"),
        ({"DYNFLOW_MAX_BODY": "0"}, "max_body"),
        ({"DYNFLOW_RUN_TIMEOUT": "1 h"}, "run_timeout"),
        ({"DYNFLOW_COPY_ON_WRITE": "magic"}, "copy_on_write"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(
    tmp_path: Path, environ: dict[str, str], named: str
) -> None:
    with pytest.raises(InvalidInputError, match=named):
        load_settings({"data": tmp_path}, environ)


def test_an_unknown_setting_in_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dynflow.toml").write_text("prot = 1\n")
    with pytest.raises(InvalidInputError, match="prot: there is no such setting"):
        load_settings({"data": tmp_path}, {})


@pytest.mark.parametrize("content", ["port = ", "\x00", 'data = "elsewhere"'])
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dynflow.toml").write_text(content)
    with pytest.raises(InvalidInputError, match=r"dynflow\.toml"):
        load_settings({"data": tmp_path}, {})


def test_secrets_show_in_no_text_of_the_settings(tmp_path: Path) -> None:
    environ = {
        "DYNFLOW_GITHUB_TOKEN": "hunter2",
        "DYNFLOW_GITHUB_WEBHOOK_SECRET": "hunter2",
        "DYNFLOW_DATABASE_URL": "postgresql://u:hunter2@h/d",
    }
    settings = load_settings({"data": tmp_path}, environ)
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert settings.store_url == "postgresql://u:hunter2@h/d"


def test_a_wrong_value_is_not_shown_for_it_may_be_secret(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_settings({"data": tmp_path, "github_token": ["hunter2"]}, {})
    assert "hunter2" not in str(caught.value)


def test_a_secret_can_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    write_secret(tmp_path / "token.txt", "hunter2")
    environ = {"DYNFLOW_GITHUB_TOKEN_FILE": str(tmp_path / "token.txt")}
    token = load_settings({"data": tmp_path}, environ).github_token
    assert token is not None
    assert token.get_secret_value() == "hunter2"


def test_a_file_with_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "dynflow.toml"
    file.write_text('github_token = "hunter2"\n')
    file.chmod(0o644)
    with pytest.raises(InvalidInputError, match="chmod 600"):
        load_settings({"data": tmp_path}, {})
    file.chmod(0o600)
    assert load_settings({"data": tmp_path}, {}).github_token is not None


def test_a_secret_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_secret(path, "one")
    write_secret(path, "two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_secret(path) == "two"
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


def test_the_data_folder_is_its_owners_alone(tmp_path: Path) -> None:
    settings = load_settings({"data": tmp_path / "new" / "data"}, {})
    make_data_folder(settings)
    make_data_folder(settings)
    assert stat.S_IMODE(settings.data.stat().st_mode) == 0o700


def test_a_data_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="data folder"):
        make_data_folder(load_settings({"data": tmp_path / "file" / "data"}, {}))


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({"host": "127.0.0.1", "port": 8420}, "http://127.0.0.1:8420"),
        ({"host": "0.0.0.0", "port": 80}, "http://localhost:80"),
        ({"host": "::1", "port": 80}, "http://[::1]:80"),
        ({"public_url": "https://ci.example.org/"}, "https://ci.example.org"),
    ],
)
def test_links_start_with_the_public_address(tmp_path: Path, options: dict[str, object], url: str) -> None:
    assert load_settings({"data": tmp_path, **options}, {}).base_url == url


def settings_table() -> str:
    """Return the table of `docs/settings.md` as it must be."""
    rows = ["| Setting | Default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        if name == "data":
            shown = "`~/.local/share/dynflow`"
        elif name == "concurrency":
            shown = "twice the processors, at least 4"
        else:
            shown = in_words(field.default)
        text = (field.description or "").replace("<", "&lt;")
        rows.append(f"| `{name}` | {shown} | {text} |")
    return "\n".join(rows)


def in_words(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, timedelta):
        seconds = round(value.total_seconds())
        for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1)):
            if seconds % length == 0:
                count = seconds // length
                return f"{count} {unit}{'' if count == 1 else 's'}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= MEBIBYTE:
        return f"{value // MEBIBYTE} MB"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_the_page_of_settings_is_what_the_code_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    assert settings_table() in page, "\n" + settings_table()
