"""After whole runs and every kind of job no file holds a secret, and what is published names no place of here."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bytecache.pipeline.config import load_settings
from bytecache.pipeline.config_text import render_published, render_template, secret_keys, secret_variable
from bytecache.pipeline.launch.command import overrides, plan_job
from bytecache.pipeline.launch.kubernetes import kubernetes_job
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Settings
from tests.support.command_line import bytecache

SECRETS = {
    "dataset.source": "https://me:hunter22@host.example/d?token=t0ken-value",
    "fleet.notice_url": "http://me:hunter22@10.0.0.1/notice",
    "fleet.notice_token_url": "http://10.0.0.1/token?key=t0ken-value",
    "fleet.notice_header": "Authorization: Bearer hunter22",
}
WORDS = (b"hunter22", b"t0ken")
GIVEN = [part for key, value in SECRETS.items() for part in ("--set", f"{key}={value}")]


def texts(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path, path.read_bytes()


@pytest.fixture
def finished(world: Path, fake_teacher: object, fake_convert: None) -> Path:
    """A run of plan, teacher and convert, alone and by workers, with secrets in every key that takes one."""
    for command in (["plan"], ["teacher"], ["convert"]):
        done = bytecache(*command, *GIVEN, "--set", "dataset.name=books")
        assert done.exit_code == 0, done.output
    for command in (["plan"], ["teacher", "--worker"], ["convert", "--worker"]):
        done = bytecache(*command, *GIVEN, "--run-dir", "shared")
        assert done.exit_code == 0, done.output
        assert not any(word.decode() in done.output for word in WORDS)
    return world


def test_no_file_of_a_run_holds_a_secret(finished: Path) -> None:
    written = [one for run in ("run", "shared") for one in texts(finished / run)]
    assert not [path for path, raw in written if any(word in raw for word in WORDS)]
    assert sum(path.name == "config.toml" for path, _ in written) >= 6


def test_what_is_published_names_no_place_and_no_fleet(finished: Path) -> None:
    for run in ("run", "shared"):
        for path, raw in texts(finished / run / "targets"):
            if path.name.endswith(".zarr.zip"):
                continue
            assert os.fsencode(finished) not in raw and b"fleet" not in raw and b"notice" not in raw, path
            if path.suffix in (".json", ".toml", ".md"):
                assert not re.search(rb"(^|[^\\w.:/])/(tmp|home|root|Users|work|mnt|data)/", raw), path
    config = (finished / "run" / "targets" / "config.toml").read_text()
    assert 'name = "books"' in config and 'source = "corpus.jsonl"' in config and "[convert]" in config
    assert not re.search(r"^\[(run|fleet|student|train)\]", config, re.MULTILINE)


def test_absolute_paths_become_their_last_part(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    settings = Settings.model_validate({
        "corpus": {"source": str(tmp_path / "texts" / "c.jsonl")},
        "teacher": {"model": str(tmp_path / "model")},
        "dataset": {"cache_dir": str(tmp_path), "name": "books"},
    })  # fmt: skip
    text = render_published(settings)
    assert str(tmp_path) not in text and 'source = "c.jsonl"' in text and 'model = "model"' in text


def test_the_configuration_comes_back_without_its_secrets_and_with_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = load_settings(None, [f"{key}={value}" for key, value in SECRETS.items()])
    file = tmp_path / "config.toml"
    file.write_text(render_template(given))
    assert not any(word in file.read_bytes() for word in WORDS)
    assert "$BYTECACHE_FLEET_NOTICE_HEADER" in file.read_text()
    again = load_settings(file)
    assert again.dataset.source.reveal() == "https://host.example/d?token=" and not again.fleet.notice_header
    for section, key in secret_keys():
        monkeypatch.setenv(secret_variable(section, key), SECRETS[f"{section}.{key}"])
    assert load_settings(None) == load_settings(None, [f"{key}={value}" for key, value in SECRETS.items()])
    elsewhere = "https://other.example/d"
    assert load_settings(None, [f"dataset.source={elsewhere}"]).dataset.source.reveal() == elsewhere


@pytest.mark.parametrize("stage", ["teacher", "convert", "train"])
def test_generated_jobs_name_variables_and_no_values(stage: str, world: Path) -> None:
    places = ["--run-dir", "s3://bucket/books", "--stage", stage]
    outputs = {
        "slurm": bytecache("jobs", "slurm", *GIVEN, *places),
        "skypilot": bytecache("jobs", "skypilot", *GIVEN, *places),
        "kubernetes": bytecache("jobs", "kubernetes", "--image", "i", "--secret", "store", *GIVEN, *places),
    }
    names = [secret_variable(*place) for place in secret_keys()]
    for kind, done in outputs.items():
        assert done.exit_code == 0, done.output
        assert not any(word.decode() in done.output for word in WORDS), kind
        if kind != "kubernetes":
            assert all(name in done.output for name in names), kind
    task = yaml.safe_load(outputs["skypilot"].output)
    assert task["secrets"] == dict.fromkeys(names)
    assert all(f"--secret {name}" in outputs["skypilot"].output for name in names)
    pod = yaml.safe_load(outputs["kubernetes"].output)["spec"]["template"]["spec"]["containers"][0]
    assert pod["envFrom"] == [{"secretRef": {"name": "store"}}]


def test_a_job_without_a_place_for_its_secrets_is_refused() -> None:
    settings = load_settings(None, ["run.dir=s3://b/r", f"fleet.notice_header={SECRETS['fleet.notice_header']}"])
    spec = plan_job(settings, "teacher", 1, 0, 1)
    assert spec.secrets == {"BYTECACHE_FLEET_NOTICE_HEADER": SECRETS["fleet.notice_header"]}
    with pytest.raises(ConfigError, match=r"put BYTECACHE_FLEET_NOTICE_HEADER into a secret .* --secret"):
        kubernetes_job(spec, image="i")


def test_headers_that_clouds_publish_travel_as_they_are() -> None:
    settings = load_settings(None, ["fleet.notice_header=Metadata-Flavor: Google", "fleet.notice_url=http://m/x"])
    assert load_settings(None, overrides(settings)) == settings


@pytest.mark.parametrize("key", ["run.dir", "corpus.source", "teacher.model", "dataset.cache_dir"])
def test_a_password_where_it_would_be_written_is_refused_and_not_repeated(key: str) -> None:
    done = bytecache("status", "--set", f"{key}=s3://me:hunter22@bucket/x")
    assert done.exit_code == 2 and "hunter22" not in done.output + done.stderr
    assert "leave it out" in done.stderr and json.dumps(key).strip('"') in done.stderr
