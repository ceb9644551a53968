"""Documents: small texts that describe the latest work (configurations, reports), each with a receipt of its own.

Unlike a unit's output a document changes; its receipt says what it is now. Before a document is replaced, its receipt
is one of both, the text that comes and the one before; so a kill at any moment leaves a document that is one of them,
and no damage. A receipt may also say of which work a document is (`of`): a command that finds its work done tells by
that whether it was killed before the document was written.
"""

import hashlib
from typing import Any

from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import FileRecord, Receipt
from bytecache.schemas.errors import IntegrityError

STAGE = "document"
"""Of their receipts."""


def write_document(store: Store, key: str, text: str, of: str = "") -> bool:
    """Make `text` the document `key`; True unless it is there already, with its receipt.

    `of`: names the work that it describes.
    """
    raw = text.encode("utf-8")
    record = FileRecord(path=key, size=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    final = _receipt_of(record, {"of": of} if of else {})
    receipt = _read(store, key)
    is_there = receipt is not None and not receipts.file_fault(store, record)
    if is_there and receipt == final:
        return False
    if not is_there:
        before = None if receipt is None else settled(store, receipt).files[0]
        if before is not None and not receipts.file_fault(store, before):
            coming = {"before_size": before.size, "before_sha256": before.sha256}
            receipts.replace_receipt(store, _receipt_of(record, coming))
        store.replace_text(key, text)
    receipts.replace_receipt(store, final)
    return True


def vouch_for(store: Store, key: str) -> None:
    """Give a document that is there already its receipt."""
    receipts.replace_receipt(store, _receipt_of(receipts.record_file(store, key), {}))


def _receipt_of(record: FileRecord, counts: dict[str, Any]) -> Receipt:
    key = record.path
    return Receipt(stage=STAGE, key=document_key(key), name=key, files=(record,), inputs={"file": key}, counts=counts)


def settled(store: Store, receipt: Receipt) -> Receipt:
    """What a receipt vouches for: of a document that was being replaced, the text that is there."""
    if receipt.stage != STAGE:
        return receipt
    size, sha256 = receipt.counts.get("before_size"), receipt.counts.get("before_sha256")
    if len(receipt.files) != 1 or not isinstance(size, int) or not isinstance(sha256, str) or size < 0:
        return receipt
    before = FileRecord(path=receipt.files[0].path, size=size, sha256=sha256)
    return receipt if receipts.file_fault(store, before) else receipt.model_copy(update={"files": (before,)})


def is_whole(store: Store, key: str) -> bool:
    """Whether a document is there as it was written, or as it was before it was being replaced."""
    receipt = _read(store, key)
    return receipt is not None and not receipts.file_fault(store, settled(store, receipt).files[0])


def work_of(store: Store, key: str) -> str | None:
    """The work that a document is of; "" where its receipt does not say, None where there is none that checks."""
    receipt = _read(store, key)
    return str(receipt.counts.get("of", "")) if receipt else None


def was_written(store: Store, key: str) -> bool:
    """Whether a document has a receipt, sound or not."""
    return store.exists(document_place(key))


def document_key(key: str) -> str:
    """Key of a document's receipt."""
    return receipts.unit_key(STAGE, {"file": key})


def document_place(key: str) -> str:
    """Where a document's receipt is stored."""
    return receipts.receipt_path(STAGE, document_key(key))


def _read(store: Store, key: str) -> Receipt | None:
    try:
        receipt = receipts.read_receipt(store, STAGE, document_key(key))
    except IntegrityError:
        return None
    return receipt if receipt and len(receipt.files) == 1 else None
