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


def open_client(url: str, timeout: float) -> Any:
    """The client of a bucket and prefix; `timeout`: seconds without a byte. Raises what the library raises."""
    if url.startswith("memory:"):
        return from_url(url)
    client: dict[str, Any] = {"timeout": f"{10 * timeout}s", "read_timeout": f"{timeout}s", "connect_timeout": "10s"}
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
