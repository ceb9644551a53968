"""Secrets as a type of setting: whoever formats, prints, hashes or writes one gets its public part.

A `Secret` holds what the user gave and the part of it that anybody may see: a URL without its password and tokens,
nothing of a header that may hold a token. Text made of it (`str`, f-strings, `repr`) is the public part with a mask;
`reveal` gives the whole, and is called where the secret is used and nowhere else. Settings of this type are left out
of every file that is written; jobs that are started elsewhere take them from the environment (`pipeline.config`).
"""

from typing import Any

from pydantic_core import core_schema

from bytecache.schemas import messages

_PUBLIC_HEADERS = frozenset({"metadata-flavor: google", "metadata: true"})
"""Headers that clouds ask for and everybody knows."""


class Secret:
    """A text that may hold a secret. Equal by its whole value; unequal ones may look alike."""

    __slots__ = ("_value",)

    def __init__(self, value: "str | Secret" = "") -> None:
        self._value: str = value._value if isinstance(value, Secret) else value
        for secret in self._secrets():
            messages.remember(secret)

    def reveal(self) -> str:
        """The whole, for the one who uses it."""
        return self._value

    @property
    def public(self) -> str:
        """The part that may be written and shown; the whole where it holds no secret."""
        return ""

    @property
    def is_secret(self) -> bool:
        """Whether there is anything that must not be seen."""
        return self._value != self.public

    def _secrets(self) -> list[str]:
        return [self._value] if self._value else []

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __str__(self) -> str:
        return messages.masked(self._value) if self.public else messages.MASK if self._value else ""

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __reduce__(self) -> "tuple[type[Secret], tuple[str]]":
        return type(self), (self._value,)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Text in, or one of this type; its public part out."""

        def check(value: Any) -> "Secret":
            if not isinstance(value, str | Secret):
                raise ValueError("expected text")
            return cls(value)

        return core_schema.no_info_plain_validator_function(
            check, serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.public)
        )


class SecretAddress(Secret):
    """A folder or URL; the secrets are the user and password and the tokens in it."""

    @property
    def public(self) -> str:
        """It without its secrets."""
        return messages.public_url(self._value)

    def _secrets(self) -> list[str]:
        return messages.url_secrets(self._value)


class SecretHeader(Secret):
    """An HTTP header, `Name: value`; its value is a secret but for those that clouds publish."""

    @property
    def public(self) -> str:
        """The whole of it where clouds publish it, else nothing."""
        return self._value if self._value.strip().lower() in _PUBLIC_HEADERS else ""

    def _secrets(self) -> list[str]:
        name, colon, value = self._value.partition(":")
        return [(value if colon else name).strip()] if self.is_secret else []

    def __str__(self) -> str:
        name, colon, _ = self._value.partition(":")
        return f"{name}: {messages.MASK}" if self.is_secret and colon else super().__str__()
