"""Editions of a run's data set: what is published of a corpus that changed keeps what was published before beside it.

Before the index of a new edition is written, the older one is copied to `targets/editions/NUMBER/`; its shards stay
where they are (`schemas.dataset.editions`). Parts of the dump that `convert.delete_dump` removed are dumped again only
where a shard of the new edition needs them.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.errors import IntegrityError

if TYPE_CHECKING:
    from bytecache.schemas.dataset.index import Dataset

_TARGETS = "targets"
"""`pipeline.commands.dataset.TARGETS`, which imports this."""


def archive_edition(store: Store, published: "Dataset | None", number: int) -> None:
    """Keep the index that edition `number` is about to replace, if it is that of an older one."""
    from bytecache.schemas.dataset.editions import edition_folder, edition_of
    from bytecache.schemas.dataset.index import DATASET, MANIFEST

    if published is None or edition_of(published.info) >= number:
        return
    for name in (MANIFEST, DATASET):
        raw = store.read_bytes(f"{_TARGETS}/{name}")
        key = f"{_TARGETS}/{edition_folder(edition_of(published.info))}/{name}"
        if not store.put_if_absent(key, store.write_temp(name, raw)) and store.read_bytes(key) != raw:
            store.replace(key, store.write_temp(name, raw))  # what is published was just read and is whole


def older_datasets(store: Store) -> list["Dataset"]:
    """The indices of older editions, oldest first; their `folder` is their own. Raises IntegrityError (damaged)."""
    from bytecache.schemas.dataset.editions import FOLDER
    from bytecache.schemas.dataset.index import DATASET, MANIFEST, read_dataset

    datasets = []
    for key in [key for key in store.list(f"{_TARGETS}/{FOLDER}") if key.endswith(f"/{DATASET}")]:
        manifest = key.removesuffix(DATASET) + MANIFEST
        if store.exists(manifest):  # absent: read_dataset says so
            store.get_path(manifest)
        datasets.append(read_dataset(store.get_path(key).parent))
    return datasets


def parent_of(store: Store, published: "Dataset | None", number: int) -> str:
    """Content hash of the data set that edition `number` follows: the newest older one that was published; or ""."""
    from bytecache.schemas.dataset.editions import edition_of

    known = [*older_datasets(store), *([published] if published else [])]
    before = [dataset for dataset in known if edition_of(dataset.info) < number]
    return max(before, key=lambda dataset: edition_of(dataset.info)).content_sha256 if before else ""


def pending_shards(store: Store, published: "Dataset | None", number: int) -> set[str]:
    """Names of shards with a receipt that the index of edition `number` will list, while an older one is published."""
    from bytecache.schemas.dataset.editions import edition_of

    if published is None or edition_of(published.info) >= number:
        return set()
    return {file.path.rpartition("/")[2] for receipt in _sound(store, "convert") for file in receipt.files}


def forget_parts(store: Store, parts: list[Receipt]) -> list[str]:
    """Forget those parts of a shard still to be made that were deleted after conversion; returns their names."""
    deleted = [part for part in parts if part.deleted]
    for part in deleted:
        store.delete(receipts.receipt_path(part.stage, part.key))
    return [part.name for part in deleted]


def _sound(store: Store, stage: str) -> Iterator[Receipt]:
    for _, key in receipts.list_receipts(store, stage):
        try:
            receipt = receipts.read_receipt(store, stage, key)
        except IntegrityError:
            continue
        if receipt is not None:
            yield receipt
