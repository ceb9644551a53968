"""Clients of the services, as the environment describes them.

Credentials, endpoint and region stand under the names that the services' own tools read (AWS_*, GOOGLE_*, AZURE_*). An
endpoint of the user's own may be http://.

STORAGE_EMULATOR_HOST (host:port or a URL), which Google's libraries read too, points gs:// at a server that speaks
Cloud Storage's XML interface, without credentials.
"""

import json
import os
from datetime import timedelta
from typing import Any

from obstore.store import from_url

_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_INSIDE = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
"""The client's own retries; the store's patience (`pipeline.stores.retry`) is beyond them."""


def open_clients(url: str, timeout: float) -> tuple[Any, Any]:
    """The clients of a bucket and prefix, to read and to write. Raises what the library raises.

    `timeout`: seconds without a byte, when reading. The library counts a body that goes out as silence, so a request
    that writes has ten times as long in all; what is written is small enough for that on a slow link (`bucket.PART`).
    """
    if url.startswith("memory:"):
        client = from_url(url)
        return client, client
    limits = {"timeout": f"{10 * timeout}s", "connect_timeout": "10s"}
    return _open(url, limits | {"read_timeout": f"{timeout}s"}), _open(url, limits)


def _open(url: str, limits: dict[str, str]) -> Any:
    client: dict[str, Any] = {**limits}
    options: dict[str, Any] = {"client_options": client, "retry_config": _INSIDE}
    endpoints = [os.environ.get(name, "") for name in _ENDPOINTS]
    if url.startswith(("s3:", "s3a:")):
        options["config"] = {"copy_if_not_exists": "multipart"}
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if url.startswith("gs:") and emulator:
        base = emulator if "://" in emulator else f"http://{emulator}"
        account = {"gcs_base_url": base.rstrip("/"), "disable_oauth": True}
        account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        options["config"] = {"service_account_key": json.dumps(account)}
        endpoints.append(base)
    if any(endpoint.startswith("http://") for endpoint in endpoints):
        client["allow_http"] = True
    return from_url(url, **options)
