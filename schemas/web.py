"""Requests that carry a secret go where they were sent and nowhere else."""

import urllib.request
from typing import Any


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def staying_opener() -> urllib.request.OpenerDirector:
    """Opens addresses and follows no redirect: the library would send keys along, to whatever host a server names.

    A redirect is an HTTPError like any other refusal.
    """
    return urllib.request.build_opener(_Stay)
