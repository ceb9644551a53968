"""Whoever has no credentials is told at once, in words of the service; whoever may have some is not held up."""

import os
from pathlib import Path

import pytest
from obstore.exceptions import GenericError

from bytecache.pipeline.stores import credentials, open_store
from bytecache.pipeline.stores.bucket import Bucket
from bytecache.pipeline.stores.objects import ObjectStore
from bytecache.schemas.errors import ConfigError, StorageError
from tests.support.loopback import Loopback, Quiet

URLS = ("s3://bucket/x", "s3a://bucket/x", "gs://bucket/x", "az://container/x", "abfs://container/x")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of a cloud, another home, and nobody at the metadata service's address."""
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "GCE_", "STORAGE_", "MSI_", "IDENTITY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(credentials, "METADATA", ("127.0.0.1", 9))


@pytest.mark.parametrize("url", URLS)
def test_nothing_anywhere(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no credentials for {url}: (set|run) .*(AWS_|GOOGLE_|AZURE_)"):
        open_store(url, str(tmp_path))


@pytest.mark.parametrize(("url", "name"), [
    ("s3://b/x", "AWS_ACCESS_KEY_ID"), ("s3://b/x", "AWS_WEB_IDENTITY_TOKEN_FILE"), ("s3://b/x", "AWS_SKIP_SIGNATURE"),
    ("s3://b/x", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"), ("s3://b/x", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    ("s3://b/x", "AWS_METADATA_ENDPOINT"), ("gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS"),
    ("gs://b/x", "GOOGLE_SERVICE_ACCOUNT_KEY"), ("gs://b/x", "STORAGE_EMULATOR_HOST"),
    ("gs://b/x", "GOOGLE_SKIP_SIGNATURE"), ("az://c/x", "AZURE_STORAGE_ACCOUNT_KEY"),
    ("az://c/x", "AZURE_STORAGE_SAS_TOKEN"), ("az://c/x", "AZURE_USE_AZURE_CLI"), ("az://c/x", "AZURE_CLIENT_ID"),
    ("az://c/x", "AZURE_STORAGE_USE_EMULATOR"), ("az://c/x", "IDENTITY_ENDPOINT"),
])  # fmt: skip
def test_what_may_hold_some_is_for_the_service_to_judge(url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "r")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "a")
    with pytest.raises(ConfigError):
        credentials.refuse_without_credentials(url)
    monkeypatch.setenv(name, "something")
    credentials.refuse_without_credentials(url)


def test_a_file_or_a_clouds_machine_may_hold_some(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / ".config/gcloud/application_default_credentials.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    credentials.refuse_without_credentials("gs://b/x")
    with pytest.raises(ConfigError):
        credentials.refuse_without_credentials("s3://b/x")
    with Loopback(Quiet) as there:
        monkeypatch.setattr(credentials, "METADATA", ("127.0.0.1", there.port))
        credentials.refuse_without_credentials("s3://b/x")


def test_a_machine_that_hands_out_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metadata service is there, and has no role for this machine."""
    asked: list[str] = []

    class Metadata(Quiet):
        def do_PUT(self) -> None:  # noqa: N802
            asked.append(self.path)
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT  # noqa: N815

    with Loopback(Metadata) as there:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", there.url)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        store = ObjectStore("s3://bucket/x", tmp_path, patience=600)
        with pytest.raises(ConfigError, match="no credentials for s3://bucket/x: set AWS_ACCESS_KEY_ID"):
            store.exists("plan/plan.json")
    assert 0 < len(asked) < 5


def test_a_metadata_service_that_pauses_later_is_waited_for() -> None:
    bucket = Bucket("s3://bucket/x", (None, None), 60.0)
    answers: list[int | Exception] = [1, GenericError("GET http://169.254.169.254/latest/meta-data/ 503"), 2]

    def request() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert bucket._try("looking", request) == 1
    assert bucket._try("looking", request) == 2
    unanswered = Bucket("s3://bucket/x", (None, None), 0.2)
    answers = [GenericError("HTTP error: no route to host")] * 100
    with pytest.raises(StorageError, match="still failing"):
        unanswered._try("looking", request)
