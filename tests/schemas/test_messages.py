"""What is shown holds no command for a terminal and nobody's secret, whatever the text is made of."""

import json
import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytecache.schemas import messages
from bytecache.schemas.messages import MASK, masked, one_line, plain, public_url, shown
from bytecache.schemas.secrets import Secret, SecretAddress, SecretHeader
from bytecache.schemas.settings import Dataset, Fleet

COMMANDS = ("Cc", "Cs", "Zl", "Zp")


@given(st.text(st.characters(codec=None), max_size=60))
def test_nothing_that_is_shown_commands_a_terminal(text: str) -> None:
    out = plain(text)
    assert not [char for char in out if unicodedata.category(char) in COMMANDS and char not in "\n\t"]
    assert plain(out) == out
    out.encode("utf-8")
    assert "\n" not in one_line(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b]52;c;aGk=\x07", "\\x1b[2J\\x1b]52;c;aGk=\\x07"),
        ("\x9b31m", "\\x9b31m"),  # CSI in one byte
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\r", "\\x0d"),
        (b"name\xff".decode("utf-8", "surrogateescape"), "name\\xff"),
        ("naïve – 日本語 👩\u200d👩", "naïve – 日本語 👩\u200d👩"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_spelling(text: str, expected: str) -> None:
    assert plain(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://u:pw@host/x: no", f"https://{MASK}@host/x: no"),
        ("two s3://k:v@b/p and https://h/?a=1&token=abc#x", f"two s3://{MASK}@b/p and https://h/?a=1&token={MASK}#x"),
        ("https://h/p?X-Amz-Signature=0af&X-Amz-Date=1", f"https://h/p?X-Amz-Signature={MASK}&X-Amz-Date=1"),
        ("https://user@host/", f"https://{MASK}@host/"),
        ("'https://h/?sig=a' quoted", f"'https://h/?sig={MASK}' quoted"),
        ("https://host/a@b mail me@x.org", "https://host/a@b mail me@x.org"),
        ("Authorization: Bearer abcdefgh.ijk", f"Authorization: Bearer {MASK}"),
        ("hf://datasets/me/books?seed=1", "hf://datasets/me/books?seed=1"),
    ],
)
def test_urls_are_masked_wherever_they_stand(text: str, expected: str) -> None:
    assert masked(text) == expected
    assert masked(masked(text)) == masked(text)


def test_a_remembered_secret_is_masked_without_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_remembered", set())
    address = SecretAddress("https://me:s%33cretword@host/p?token=t0ken-value&page=2")
    for words in ("cannot log in with s%33cretword", "or s3cretword", "or t0ken-value"):
        assert shown(words) == words.rsplit(" ", 1)[0] + f" {MASK}"
    assert address.public == "https://host/p?token=&page=2" and "page=2" in str(address)


@pytest.mark.parametrize(
    ("secret", "public"),
    [
        (SecretAddress("https://me:hunter22@host/d"), "https://host/d"),
        (SecretHeader("Authorization: Token hunter22"), ""),
        (SecretHeader("hunter22"), ""),
        (Secret("hunter22"), ""),
    ],
)
def test_a_secret_is_never_part_of_text_made_of_it(secret: Secret, public: str) -> None:
    made = [str(secret), repr(secret), f"{secret}", f"{secret!r:>30}", f"{secret}", f"{[secret]} { ({'a': secret}) }"]
    made.append(json.dumps(secret, default=str))
    assert not [text for text in made if "hunter22" in text], made
    assert secret.public == public and secret.is_secret and "hunter22" in secret.reveal()
    assert pickle.loads(pickle.dumps(secret)) == secret


def test_what_holds_no_secret_is_written_as_it_is() -> None:
    for plain_one in (
        SecretAddress("/data/books"),
        SecretAddress("hf://datasets/me/x"),
        SecretHeader("Metadata: true"),
    ):
        assert not plain_one.is_secret and plain_one.public == plain_one.reveal() == str(plain_one)
    assert not Secret("").is_secret and not Secret("")
    assert public_url("/a/b@c?d=e") == "/a/b@c?d=e"


def test_dumped_settings_hold_the_public_part() -> None:
    fleet = Fleet(notice_url="http://me:hunter22@host/x", notice_header="Authorization: hunter22")
    dataset = Dataset(source="https://host/d?token=hunter22")
    for section in (fleet, dataset):
        dumped = [section.model_dump_json(), str(section.model_dump()), repr(section), str(section)]
        assert not [text for text in dumped if "hunter22" in text]
    assert fleet.notice_url.reveal() == "http://me:hunter22@host/x"
