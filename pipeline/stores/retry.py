"""Retries of an object store's requests, by the policy of `schemas.patience`.

What may pass is repeated: 5xx, throttling, time-outs, torn connections, a body that arrives short or altered. What will
not is refused at once with its remedy: credentials, permissions, a missing bucket, and bytes that are wrong in the same
way when they are read again. Every request here may be repeated: a conditional write that in truth succeeded is
recognised as ours by the tag it carries (`Bucket.create`).
"""

from collections.abc import Callable
from typing import TypeVar

from bytecache.schemas.errors import IntegrityError, StorageError
from bytecache.schemas.patience import Patience

Result = TypeVar("Result")
_FATAL = ("PermissionDeniedError", "UnauthenticatedError", "UnknownConfigurationKeyError", "InvalidPathError")
# Their services answer these as plain 404 or 400, which the library files under its general error.
_FATAL_WORDS = (
    "NoSuchBucket",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ContainerNotFound",
    "ExpiredToken",
    "builder error",
)
MOST_ALTERED = 8
"""Times that bytes may arrive otherwise each time."""


class Damaged(Exception):  # noqa: N818 - a reason to fetch again, not yet an error
    """A download whose bytes are not those that were stored. `sha256`: theirs."""

    def __init__(self, message: str, sha256: str) -> None:
        super().__init__(message)
        self.sha256 = sha256


def patiently(
    doing: str, request: Callable[[], Result], seconds: float, progress: Callable[[], int] = lambda: 0
) -> Result:
    """`request()`, repeated for up to so many seconds without `progress` (bytes so far).

    FileNotFoundError, NotImplementedError and the library's AlreadyExistsError pass through. Raises StorageError where
    the service refuses or the patience ends, IntegrityError where the bytes stay wrong.
    """
    from obstore.exceptions import AlreadyExistsError, BaseError

    patience, before, arrived = Patience(seconds), progress(), list[str]()
    while True:
        try:
            return request()
        except AlreadyExistsError:
            raise
        except (BaseError, FileNotFoundError, TimeoutError, ConnectionError, Damaged) as error:
            reason = str(error).split("\n")[0][:300]
            fatal = type(error).__name__ in _FATAL or any(word in str(error) for word in _FATAL_WORDS)
            if isinstance(error, FileNotFoundError) and not fatal:
                raise
            if fatal:
                raise StorageError(
                    f"{doing}: the service refuses ({reason}); check the credentials, the bucket and its permissions"
                ) from error
            if isinstance(error, Damaged):
                # What a network alters it alters otherwise the next time; a disk does not.
                if error.sha256 in arrived or len(arrived) == MOST_ALTERED:
                    raise _damaged(doing, reason) from error
                arrived.append(error.sha256)
            if progress() > before:
                patience.renew()
            before = progress()
            if patience.pause():
                continue
            if isinstance(error, Damaged):
                raise _damaged(doing, reason) from error
            raise StorageError(
                f"{doing}: still failing after {seconds:.0f} s ({reason}); rerun the same command when the service is "
                "well again"
            ) from error


def _damaged(doing: str, reason: str) -> IntegrityError:
    return IntegrityError(f"{doing}: {reason}; delete the object and rerun the stage")
