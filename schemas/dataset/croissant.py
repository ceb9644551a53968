"""Croissant 1.0 metadata of a data set (mlcommons.org/croissant/1.0): JSON-LD for search engines and loaders.

It repeats the index: files with their hashes, the shards as one set of files, and the preview and the manifest as
record sets. Nothing in it is of the machine that wrote it, and no time of day.
"""

import json
from collections.abc import Mapping
from typing import Any

from bytecache.schemas.dataset.preview import PREVIEW_FIELDS

FILE = "croissant.json"
_TERMS = (
    "citeAs", "column", "data", "dataType", "equivalentProperty", "examples", "extract", "field", "fileObject",
    "fileProperty", "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path",
    "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField",
    "transform",
)  # fmt: skip
"""Names that the standard defines; the rest is schema.org's."""
_MANIFEST_FIELDS = {
    "file": ("sc:Text", "File name of a shard."),
    "split": ("sc:Text", "train or heldout."),
    "sha256": ("sc:Text", "Hash of the file."),
    "n_documents": ("sc:Integer", "Documents in the shard."),
    "n_bytes": ("sc:Integer", "Bytes of text in the shard."),
}


def render(
    document: dict[str, Any], root: str, repository: str, hashes: Mapping[str, str], previews: Mapping[str, str]
) -> bytes:
    """The metadata of an index document.

    Args:
        document: `dataset.json` as an object. root: URL under which the files lie. repository: URL of the place that
            holds them all. hashes: sha256 of dataset.json, of the manifest and of the previews, by their path below
            `root`. previews: split to path.
    """
    info = document["info"]
    name = " ".join(str(info.get("name") or "Byte targets").split())
    tables = {"manifest": document["manifest"]["file"]} | {f"preview-{split}": path for split, path in previews.items()}
    model = (info.get("teacher") or {}).get("model") or "a teacher language model"
    value = {
        "@context": _context(),
        "@type": "sc:Dataset",
        "name": name,
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "description": f"Next-byte distributions of {model} at every byte of a text, for byte-level distillation.",
        "license": info.get("license") or "not stated",
        "url": repository,
        "version": "1.0.0",
        "citeAs": "Byte-level distillation, arXiv 2604.07466",
        "keywords": ["knowledge distillation", "byte-level", "language models"],
        "distribution": [
            _object("repository", repository, repository, "git+https", document["manifest"]["content_sha256"]),
            _object("index", "dataset.json", f"{root}/dataset.json", "application/json", hashes["dataset.json"]),
            *(
                _object(key, path, f"{root}/{path}", "application/x-parquet", hashes[path])
                for key, path in tables.items()
            ),
            {
                "@type": "cr:FileSet",
                "@id": "shards",
                "name": "shards",
                "description": "Zarr v3 groups in zip files, one a shard; their hashes stand in the manifest.",
                "containedIn": {"@id": "repository"},
                "encodingFormat": "application/zip",
                "includes": "*.zarr.zip",
            },
        ],
        "recordSet": [
            _records("shard_list", "manifest", "The shards and their sizes.", _MANIFEST_FIELDS),
            *(
                _records(f"preview_{split}", f"preview-{split}", f"Positions of the {split} split.", PREVIEW_FIELDS)
                for split in previews
            ),
        ],
    }
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _context() -> dict[str, Any]:
    context: dict[str, Any] = {"@language": "en", "@vocab": "https://schema.org/"}
    context |= {
        "sc": "https://schema.org/",
        "cr": "http://mlcommons.org/croissant/",
        "dct": "http://purl.org/dc/terms/",
    }
    context |= {term: f"cr:{term}" for term in _TERMS}
    context |= {term: {"@id": f"cr:{term}", "@type": "@json"} for term in ("data", "examples")}
    return context | {"dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "conformsTo": "dct:conformsTo"}


def _object(key: str, name: str, url: str, kind: str, sha256: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject", "@id": key, "name": name, "contentUrl": url, "encodingFormat": kind, "sha256": sha256
    }  # fmt: skip


def _records(key: str, file: str, description: str, fields: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": key,
        "name": key,
        "description": description,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{key}/{name}",
                "name": name,
                "description": words,
                "dataType": kind,
                "source": {"fileObject": {"@id": file}, "extract": {"column": name}},
            }
            for name, (kind, words) in fields.items()
        ],
    }
