"""Documents: small texts that describe the latest work (configurations, reports), each with a receipt of its own.

Unlike a unit's output a document changes; its receipt, written after it, says what it is now. A kill between the two
leaves a document that its receipt does not fit: the next call of the command that writes it sets that right.
"""

import hashlib

from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import FileRecord, Receipt
from bytecache.schemas.errors import IntegrityError

STAGE = "document"
"""Of their receipts."""


def write_document(store: Store, key: str, text: str) -> bool:
    """Make `text` the document `key`; True unless it is there already, with its receipt."""
    raw = text.encode("utf-8")
    record = FileRecord(path=key, size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    if _recorded(store, key) == record and not receipts.file_fault(store, record):
        return False
    store.replace_text(key, text)
    _write_receipt(store, record)
    return True


def vouch_for(store: Store, key: str) -> None:
    """Give a document that is there already its receipt."""
    _write_receipt(store, receipts.record_file(store, key))


def _write_receipt(store: Store, record: FileRecord) -> None:
    key = record.path
    receipt = Receipt(stage=STAGE, key=document_key(key), name=key, files=(record,), inputs={"file": key})
    receipts.replace_receipt(store, receipt)


def is_whole(store: Store, key: str) -> bool:
    """Whether a document is there as it was written."""
    record = _recorded(store, key)
    return record is not None and not receipts.file_fault(store, record)


def was_written(store: Store, key: str) -> bool:
    """Whether a document has a receipt, sound or not."""
    return store.exists(document_place(key))


def document_key(key: str) -> str:
    """Key of a document's receipt."""
    return receipts.unit_key(STAGE, {"file": key})


def document_place(key: str) -> str:
    """Where a document's receipt is stored."""
    return receipts.receipt_path(STAGE, document_key(key))


def _recorded(store: Store, key: str) -> FileRecord | None:
    try:
        receipt = receipts.read_receipt(store, STAGE, document_key(key))
    except IntegrityError:
        return None
    return receipt.files[0] if receipt and len(receipt.files) == 1 else None
