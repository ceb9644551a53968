"""Google Cloud Storage's XML interface on loopback, as far as a store uses it, in threads of this process.

No emulator from a package registry speaks enough of it (fake-gcs-server and gcp-storage-emulator take no plain PUT), so
this one is ours, written after Google's documentation of the interface: it cannot show that Google does the same.
Held to: a PUT is atomic and gives a new generation; `x-goog-if-generation-match` compares it, 0 = absent, and 412
answers a mismatch; custom metadata is kept by a PUT, a copy and an upload in parts; parts but the last have 5 MiB at
least, and an upload is invisible until it is completed; listings are sorted, in pages, and true of the moment; a body
that is cut short changes nothing; an object takes one write a second where `rate` says so, and faster ones get 429.
"""

import hashlib
import itertools
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.support.loopback import Loopback, Quiet

PART = 5 * 1024 * 1024
PAGE = 3
"""Names in a page of a listing: few, so that tests turn pages."""


@dataclass(frozen=True)
class Stored:
    """One generation of an object."""

    raw: bytes
    generation: int
    metadata: dict[str, str]
    at: float

    @property
    def headers(self) -> dict[str, str]:
        return {
            "ETag": f'"{hashlib.md5(self.raw).hexdigest()}"', "x-goog-generation": str(self.generation),
            "Last-Modified": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(self.at)), **self.metadata,
        }  # fmt: skip


@dataclass
class Upload:
    """Parts so far."""

    key: str
    metadata: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818 - an answer
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class GCSServer(Loopback):
    """One bucket. `rate`: whether an object takes one write a second only."""

    def __init__(self, bucket: str = "bucket") -> None:
        self.bucket, self.rate = bucket, False
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, Upload] = {}
        self.refused: list[str] = []
        self.lock = threading.Lock()
        self.generations = itertools.count(1)
        server = self

        class Handler(Quiet):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                if len(body) < length:  # the client went away
                    self.close_connection = True
                    return
                split = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
                bucket, _, key = split.path.removeprefix("/").partition("/")
                headers = {name.lower(): value for name, value in self.headers.items()}
                try:
                    if bucket != server.bucket:
                        raise Refusal(404, "NoSuchBucket")
                    with server.lock:
                        status, out, raw = server.answer(self.command, unquote(key), query, headers, body)
                except Refusal as refusal:
                    server.refused.append(refusal.code)
                    status, out = refusal.status, {}
                    raw = f"<Error><Code>{refusal.code}</Code><Message>no</Message></Error>".encode()
                self.send_response_only(status)
                for name, value in {"Content-Length": str(len(raw)), **out}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(raw)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

        super().__init__(Handler)

    def answer(
        self, method: str, key: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request; the lock is held."""
        metadata = {name: value for name, value in headers.items() if name.startswith("x-goog-meta-")}
        if not key:
            return 200, {}, self.page(query)
        if method == "POST" and "uploads" in query:
            name = f"upload-{next(self.generations)}"
            self.uploads[name] = Upload(key, metadata)
            return 200, {}, _xml("InitiateMultipartUploadResult", UploadId=name)
        if "uploadId" in query:
            return self.part(method, query, body)
        if method in ("GET", "HEAD"):
            return self.get(key, headers)
        if method == "DELETE":
            self.found(key)
            del self.objects[key]
            return 204, {}, b""
        source = headers.get("x-goog-copy-source")
        if source is None:
            return self.put(key, body, metadata, headers)
        bucket, _, name = unquote(source).removeprefix("/").partition("/")
        assert bucket == self.bucket
        given = self.found(name)
        status, out, _ = self.put(key, given.raw, given.metadata, headers)
        return status, out, _xml("CopyObjectResult", ETag=out["ETag"])

    def found(self, key: str) -> Stored:
        if key not in self.objects:
            raise Refusal(404, "NoSuchKey")
        return self.objects[key]

    def put(
        self, key: str, raw: bytes, metadata: dict[str, str], headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        old = self.objects.get(key)
        wanted = headers.get("x-goog-if-generation-match")
        if wanted is not None and int(wanted) != (old.generation if old else 0):
            raise Refusal(412, "PreconditionFailed")
        if self.rate and old and time.time() - old.at < 1:
            raise Refusal(429, "SlowDown")
        made = Stored(raw, next(self.generations), metadata, time.time())
        self.objects[key] = made
        return 200, {name: made.headers[name] for name in ("ETag", "x-goog-generation")}, b""

    def get(self, key: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        stored = self.found(key)
        raw, out = stored.raw, {**stored.headers, "Content-Length": str(len(stored.raw))}
        if "range" not in headers:
            return 200, out, raw
        begin, _, end = headers["range"].removeprefix("bytes=").partition("-")
        first, last = int(begin), min(int(end) if end else len(raw) - 1, len(raw) - 1)
        if first > last:
            raise Refusal(416, "InvalidRange")
        out |= {"Content-Range": f"bytes {first}-{last}/{len(raw)}", "Content-Length": str(last + 1 - first)}
        return 206, out, raw[first : last + 1]

    def part(self, method: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        name = query["uploadId"]
        if name not in self.uploads:
            raise Refusal(404, "NoSuchUpload")
        upload = self.uploads[name]
        if method == "DELETE":
            del self.uploads[name]
            return 204, {}, b""
        if method == "PUT":
            upload.parts[int(query["partNumber"])] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""
        numbers = [
            int(node.text or 0) for node in ElementTree.fromstring(body).iter() if node.tag.endswith("PartNumber")
        ]
        if numbers != sorted(set(numbers)) or not set(numbers) <= set(upload.parts):
            raise Refusal(400, "InvalidPart")
        if any(len(upload.parts[number]) < PART for number in numbers[:-1]):
            raise Refusal(400, "EntityTooSmall")
        raw = b"".join(upload.parts[number] for number in numbers)
        _, out, _ = self.put(upload.key, raw, upload.metadata, {})
        del self.uploads[name]
        return 200, out, _xml("CompleteMultipartUploadResult", ETag=out["ETag"])

    def page(self, query: dict[str, str]) -> bytes:
        assert query["list-type"] == "2"
        after = query.get("continuation-token", "")
        keys = sorted(key for key in self.objects if key.startswith(query.get("prefix", "")) and key > after)
        fields = [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key].raw)}</Size>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(self.objects[key].at))}</LastModified>"
            f"<ETag>{escape(self.objects[key].headers['ETag'])}</ETag></Contents>"
            for key in keys[:PAGE]
        ]
        if len(keys) > PAGE:
            fields.append(f"<NextContinuationToken>{escape(keys[PAGE - 1])}</NextContinuationToken>")
        return f"<ListBucketResult>{''.join(fields)}</ListBucketResult>".encode()


def _xml(name: str, **fields: str) -> bytes:
    inner = "".join(f"<{field}>{escape(value)}</{field}>" for field, value in fields.items())
    return f"<{name}>{inner}</{name}>".encode()
