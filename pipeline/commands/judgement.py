"""Who is right where a manifest, receipts and shards say different things of each other: the shard, opened.

Whoever contradicts what a shard holds is set aside; conversion then makes it again from the dump. A certificate of
fidelity is not in the shards: where index and receipts differ about it alone, all shards are converted again.
"""

from pathlib import Path

from bytecache.pipeline.commands.dataset import TARGETS, shard_entry, whole_index
from bytecache.pipeline.commands.inventory import Inventory
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.aside import set_aside
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.dataset.index import DATASET, Dataset, ShardEntry
from bytecache.schemas.dataset.verification import check_shard


def judge(store: Store, inventory: Inventory) -> list[str]:
    """Open every listed shard and set aside what contradicts it; returns what was done.

    Price: decodes every shard.
    """
    published = whole_index(store)
    if published is None:  # a damaged one is made again anyhow
        return []
    by_file = {Path(receipt.files[0].path).name: receipt for receipt in inventory.of("convert")}
    done, index_is_wrong = [], False
    for entry in published.entries:
        lines, false_entry = _judge_shard(store, entry, by_file.get(entry.file))
        done += lines
        index_is_wrong |= false_entry
    if not done and not index_is_wrong:
        done, index_is_wrong = _judge_certificate(store, published, list(by_file.values())), True
    if index_is_wrong:
        key = f"{TARGETS}/{DATASET}"
        done.append(f"set aside: {key} as {set_aside(store, key)}, which contradicts its shards or their receipts")
    return done


def _judge_shard(store: Store, entry: ShardEntry, receipt: Receipt | None) -> tuple[list[str], bool]:
    """What was set aside because of one shard, and whether its entry in the index is wrong."""
    path = store.get_path(f"{TARGETS}/{entry.file}")
    fault = check_shard(path, entry, deep=True)
    row = shard_entry(receipt) if receipt else entry
    wrong = check_shard(path, row.model_copy(update={"file": entry.file}), deep=True)
    if wrong is None or receipt is None:
        return [], fault is not None
    moved = set_aside(store, receipts.receipt_path("convert", receipt.key))
    return [f"set aside: the receipt of {entry.file} as {moved} ({wrong.detail})"], fault is not None


def _judge_certificate(store: Store, published: Dataset, shards: list[Receipt]) -> list[str]:
    """Receipts of all shards, so that they are converted again and measured anew."""
    for receipt in shards:
        set_aside(store, receipts.receipt_path("convert", receipt.key))
    return [f"set aside: the receipts of {len(shards)} shards: they and the index disagree on their fidelity"]
