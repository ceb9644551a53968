"""Whether a service's credentials can be had at all: known before the first request, not after minutes of asking.

The clients take credentials from the environment, else from the machine they run on: a cloud's machines have an address
that hands them out (the metadata service). Where the environment has none and nobody answers there, no patience helps.
What holds some may still be wrong; that is the service's to say. `is_about_credentials` tells a request for credentials
from one for an object, by its address.
"""

import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

from bytecache.schemas.errors import ConfigError

SECONDS = 2.0
"""For which the metadata service is waited for; it is on the machine's own link, and answers in milliseconds."""
METADATA = ("169.254.169.254", 80)


class _Service(NamedTuple):
    """How a service's clients come by credentials."""

    variables: str
    """Regular expression of environment variables, any of which may hold some, or say where they are."""
    files: tuple[str, ...]
    """In the home folder."""
    remedy: str


_S3 = _Service(
    r"AWS_.*(KEY|TOKEN|CREDENTIAL|ROLE|SKIP_SIGNATURE|METADATA).*", (),
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (profiles in ~/.aws are not read here: `aws configure "
    "export-credentials --format env` prints them), or AWS_SKIP_SIGNATURE=true for a public bucket",
)  # fmt: skip
_GS = _Service(
    r"(GOOGLE|GCE|STORAGE)_.*(ACCOUNT|CREDENTIAL|KEY|TOKEN|SKIP_SIGNATURE|METADATA|EMULATOR).*",
    (".config/gcloud/application_default_credentials.json",),
    "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a service account's file",
)
_AZ = _Service(
    r"(AZURE|IDENTITY|MSI)_.*(KEY|SAS|TOKEN|CLIENT|CLI|EMULATOR|SKIP_SIGNATURE|ENDPOINT|CREDENTIAL|SECRET).*", (),
    "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
)  # fmt: skip
_SERVICES = {"s3": _S3, "s3a": _S3, "gs": _GS, "az": _AZ, "azure": _AZ, "abfs": _AZ, "abfss": _AZ}
_REQUESTS = re.compile(
    r"169\.254\.(169\.254|170\.2)|/latest/(api/token|meta-data)|/computeMetadata/|/metadata/identity|token request"
)


def remedy(url: str) -> str:
    """What gives a URL's service its credentials, in words; "" of one that needs none."""
    service = _SERVICES.get(url.partition("://")[0])
    return service.remedy if service else ""


def refuse_without_credentials(url: str) -> None:
    """Raises ConfigError where neither the environment nor this machine can have credentials for a URL."""
    service = _SERVICES.get(url.partition("://")[0])
    if service is None or any(re.fullmatch(service.variables, name) for name, value in os.environ.items() if value):
        return
    if any((Path.home() / name).is_file() for name in service.files) or _is_of_a_cloud():
        return
    raise ConfigError(f"no credentials for {url}: {service.remedy}")


def _is_of_a_cloud() -> bool:
    """Whether somebody answers where a cloud's machines have their metadata service."""
    try:
        socket.create_connection(METADATA, timeout=SECONDS).close()
        return True
    except OSError:
        return False


def is_about_credentials(words: str) -> bool:
    """Whether a client's error came of asking for credentials, not for an object."""
    return _REQUESTS.search(words) is not None
