"""Setting aside: what repair or conversion does not know is moved out of the way, never deleted.

`set-aside/` in the run folder mirrors the places that its files came from (those of the data set lie at its top). No
command reads it; whoever is sure deletes it. Price: a rename, or in an object store a copy on the server.
"""

import shutil

from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.schemas.errors import IntegrityError

ASIDE = "set-aside"
_TARGETS = "targets/"


def set_aside(store: Store, key: str) -> str:
    """Move an object to `set-aside/`; returns its new key, numbered where that name is taken."""
    wanted = f"{ASIDE}/{key.removeprefix(_TARGETS)}"
    place, number = wanted, 0
    while store.exists(place):
        number += 1
        place = f"{wanted}.{number}"
    store.move(key, place)
    return place


def set_folder_aside(store: Store, prefix: str) -> list[str]:
    """Move every object under a folder of keys to `set-aside/`; returns their new keys.

    The folder's local copy goes too where the store is a remote one, so that no stage takes it for its own work.
    """
    moved = [set_aside(store, key) for key in list(store.list(prefix))]
    shutil.rmtree(store.folder(prefix), ignore_errors=True)  # empty folders, or copies of what is set aside now
    return moved


def set_damaged_folder_aside(store: Store, stage: str, key: str, prefix: str) -> list[str]:
    """Set aside the folder of a unit whose receipt it does not fit; returns the new keys, none where it fits.

    A stage that finds its folder whole by a record inside it would otherwise vouch for what damaged that record.
    """
    try:
        receipt = receipts.read_receipt(store, stage, key)
    except IntegrityError:
        return []
    return set_folder_aside(store, prefix) if receipt and receipts.problems(store, receipt) else []
