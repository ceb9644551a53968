"""The index of a run's data set: what identifies it, when it is refused, and its publication after the last shard."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytecache.pipeline.commands.editions import archive_edition, older_datasets, parent_of
from bytecache.pipeline.config import changed_keys, flattened
from bytecache.pipeline.context import Context
from bytecache.pipeline.plan.index import Plan
from bytecache.pipeline.stores import Store
from bytecache.pipeline.units import receipts
from bytecache.pipeline.units.aside import set_aside as set_aside_file
from bytecache.pipeline.units.receipts import Receipt
from bytecache.schemas.errors import ConfigError, InputError, IntegrityError
from bytecache.schemas.identity import TeacherIdentity

if TYPE_CHECKING:
    from bytecache.schemas.dataset.index import Dataset, ShardEntry

TARGETS = "targets"
CONVERTER = tuple(f"bytecache.{module}" for module in (
    "stages.convert.convert", "stages.convert.coarser", "stages.convert.effort", "stages.convert.precision",
    "schemas.dump.rows", "stages.lattice.lattice", "stages.lattice.forward", "stages.lattice.tables",
    "stages.lattice.effort", "stages.fidelity.certificate",
    "stages.fidelity.divergence", "stages.fidelity.bound", "stages.fidelity.measure", "stages.fidelity.measuring",
    "schemas.dump.parquet", "schemas.dump.window",
    "schemas.dump.packed", "schemas.dump.packing", "schemas.dump.unpacking", "schemas.dump.shares",
    "schemas.dump.planes", "schemas.dump.orders", "schemas.dump.pooling", "schemas.dump.spellings",
    "schemas.dump.likely", "schemas.dump.ranking", "schemas.dump.version2", "schemas.shard.builder",
    "schemas.shard.blocks", "schemas.shard.gather", "schemas.shard.sorting", "schemas.shard.prior",
    "schemas.shard.quantise", "schemas.shard.logarithms", "schemas.shard.codes", "schemas.shard.reader",
    "schemas.shard.expansion", "schemas.shard.zarr_zip", "schemas.shard.worth", "schemas.shard.rounding",
    "schemas.shard.divergence", "schemas.shard.incoming", "schemas.shard.reasons", "schemas.loops", "schemas.arrays",
    "schemas.identity",
))  # fmt: skip
"""Modules whose code decides the bytes of a shard and the figures of its certificate."""
_RESTATED = ("name", "license", "corpus_license", "teacher_license", "attribution")
"""What an index says about its shards that may be corrected afterwards."""


def teacher_counts(receipt: Receipt) -> dict[str, Any]:
    """What the teacher counted: of a dump part, or of the units that became a shard at once (`teacher.keep`)."""
    counts: dict[str, Any] = receipt.counts.get("teacher", {}) if receipt.stage == "convert" else receipt.counts
    return counts


def set_aside(dumps: list[Receipt]) -> dict[str, int]:
    """Documents set aside by reason, over dump receipts."""
    counts: dict[str, int] = defaultdict(int)
    for receipt in dumps:
        for reason, count in teacher_counts(receipt).get("set_aside", {}).items():
            counts[reason] += count
    return dict(counts)


def certificate(shards: list[Receipt], teacher: dict[str, Any]) -> dict[str, Any] | None:
    """The fidelity of all shards together: measured where the dump had reference windows, bounded everywhere."""
    from bytecache.stages.fidelity.bound import Bound
    from bytecache.stages.fidelity.certificate import Fidelity
    from bytecache.stages.fidelity.noise import Noise

    reference: dict[str, Any] = next((r.counts["reference"] for r in shards if r.counts.get("reference")), {})
    # Sums are those of the manifest's order, whoever makes them: receipts come in that of a plan or of a folder.
    shards = sorted(shards, key=lambda receipt: (receipt.inputs["split"] != "train", receipt.files[0].path))
    measured = Fidelity(receipt.counts.get("fidelity") for receipt in shards).certificate(teacher, reference)
    bound = Bound(receipt.counts.get("bound") for receipt in shards).summary()
    noise = Noise(state for receipt in shards for state in receipt.counts.get("noise", ())).summary()
    more = {name: figure for name, figure in (("bound", bound), ("noise", noise)) if figure is not None}
    return (measured or {}) | more if more else measured


def dataset_identity(
    context: Context, planned: Plan, teacher: dict[str, Any], missing: Sequence[int] = ()
) -> dict[str, Any]:
    """What tells one data set from another: whose targets, of which text, how converted. `teacher`: its identity.

    `missing`: units of the plan that it goes without.
    """
    return {
        "teacher": teacher,
        "corpus": planned.corpus,
        "settings": {
            "plan": planned.settings,
            "convert": context.settings.convert.shaping(),
            "conversion_code": receipts.code_fingerprint(*CONVERTER)[:16],
            **({"missing_units": list(missing)} if missing else {}),
        },
    }


def straight_identity(
    context: Context, planned: Plan, teacher: dict[str, Any], missing: Sequence[int] = ()
) -> dict[str, Any]:
    """`dataset_identity` of shards that the teacher's workers made: whose code converted does not tell them apart."""
    identity = dataset_identity(context, planned, teacher, missing)
    del identity["settings"]["conversion_code"]
    return identity


def dataset_info(
    context: Context, planned: Plan, dumps: list[Receipt], missing: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """What the index says about where its targets came from; `software` and `creation` explain, the rest identifies.

    `dumps`: receipts of the dump, or of shards that the teacher's workers made. `missing`: see
    `pipeline.commands.missing.describe`.
    """
    identity = dumps[0].inputs["teacher"]
    teacher = TeacherIdentity.of(identity, f"receipt {dumps[0].name}")
    identified_by = straight_identity if dumps[0].stage == "convert" else dataset_identity
    code = sorted({str(receipt.counts["conversion_code"]) for receipt in dumps if receipt.stage == "convert"})
    return {
        **identified_by(context, planned, identity, [unit["unit"] for unit in missing]),
        "tokenizer": {
            "vocabulary_sha256": teacher.vocabulary,
            **{name: dumps[0].inputs[name] for name in ("template",) if name in dumps[0].inputs},
        },
        "software": receipts.software_versions(),
        "creation": {
            "plan": planned.hash,
            "set_aside": set_aside(dumps),
            **({"conversion_code": code} if code else {}),
            **({"missing": list(missing)} if missing else {}),
        },
        "edition": {
            "number": planned.edition,
            "parent": parent_of(context.store, whole_index(context.store), planned.edition),
        },
        "name": context.settings.dataset.name,
        "license": context.settings.dataset.license,
        "corpus_license": context.settings.corpus.license,
        "teacher_license": context.settings.dataset.teacher_license,
        "attribution": context.settings.corpus.attribution,
    }


def read_index(store: Store) -> "Dataset | None":
    """The index of the data set in a run, or None if none was published; shards are not touched.

    Raises IntegrityError if it is damaged.
    """
    from bytecache.schemas.dataset.index import DATASET, MANIFEST, read_dataset

    if not store.exists(f"{TARGETS}/{DATASET}"):
        return None
    if store.exists(f"{TARGETS}/{MANIFEST}"):  # absent: read_dataset says so
        store.get_path(f"{TARGETS}/{MANIFEST}")
    return read_dataset(store.get_path(f"{TARGETS}/{DATASET}").parent)


def whole_index(store: Store) -> "Dataset | None":
    """The index, or None where there is none or a damaged one, of which others say what is wrong with it."""
    try:
        return read_index(store)
    except IntegrityError:
        return None


def refuse_other_dataset(context: Context, info: dict[str, Any], edition: int) -> None:
    """A published data set is never changed: somebody may be reading it. `info`: see `dataset_identity`.

    A later edition of the plan may have another corpus (and lack other units of it), nothing else.
    """
    from bytecache.schemas.dataset.editions import edition_of

    published = whole_index(context.store)
    if published is None:  # a damaged one is made again
        return
    old = published.info
    changes: list[str] = []
    for name in ("teacher", "corpus", "settings"):
        before, now = flattened(old.get(name, {})), flattened(info[name])
        if edition_of(old) < edition:
            if name == "corpus":
                continue
            before.pop("missing_units", None)
            now.pop("missing_units", None)
        changes += changed_keys(before, now)
    if changes:
        raise ConfigError(
            f"{context.store.name}/{TARGETS} holds a data set made otherwise ({'; '.join(changes[:4])}); restore that, "
            "delete the folder, or choose a new run.dir"
        )


def shard_entry(receipt: Receipt) -> "ShardEntry":
    """The manifest's row of a shard, from its receipt."""
    from bytecache.schemas.dataset.index import ShardEntry

    (file,) = receipt.files
    fixed = {
        "file": Path(file.path).name,
        "split": receipt.inputs["split"],
        "sha256": file.sha256,
        "size": file.size,
        "key": receipt.key,
    }
    counted = {name: receipt.counts[name] for name in ShardEntry.model_fields if name not in fixed}
    return ShardEntry(**fixed, **counted)


def publish_index(context: Context, shards: list[Receipt], info: dict[str, Any]) -> bool:
    """Write manifest.parquet, the card and dataset.json unless they already say the same; True if written.

    What lies there unlisted is set aside. Raises IntegrityError if the published index says other things of the same
    shards: one of both was altered, and what others may be reading is not rewritten on a guess.
    """
    from bytecache.schemas.dataset import card
    from bytecache.schemas.dataset.index import MANIFEST, index_documents

    store = context.store
    entries = [shard_entry(receipt) for receipt in shards]
    if not any(entry.n_documents for entry in entries if entry.split == "train"):
        from bytecache.stages.tokens.misfits import remedy, words

        aside = info["creation"]["set_aside"]
        if not aside:
            raise InputError(
                "no document is left for training, all are held out; lower corpus.heldout_fraction, or plan more text "
                "(corpus.max_bytes, corpus.text_split) in a new run.dir"
            )
        raise InputError(
            f"the teacher could read no training document because {words(aside)}; {remedy(aside, 'teacher')}"
        )
    measured = certificate(shards, info["teacher"])
    published, fault = None, ""
    try:
        published = read_index(store)
    except IntegrityError as error:
        fault = str(error)
    if published is not None and _says_the_same(published, entries, info, measured):
        return mend_card(context)
    documents = index_documents(entries, info, measured)
    if fault and not _was_cut_off(store, documents[MANIFEST]):
        _set_index_aside(context, fault)
    archive_edition(store, published, info["edition"]["number"])
    disputed = contradictions(published, shards, measured)
    if disputed:
        raise IntegrityError(
            f"{store.name}/{TARGETS}: receipts and the published index disagree ({'; '.join(disputed[:3])}); the index "
            "is not rewritten: run `bytecache verify --repair`, which opens the shards to see which of the two is right"
        )
    older = [entry for dataset in older_datasets(store) for entry in dataset.entries]
    listed = [*entries, *older]
    _clear_unlisted(context, {entry.file for entry in listed}, {entry.key for entry in listed})
    for name, raw in documents.items():
        key = f"{TARGETS}/{name}"
        if name == card.FILE and store.exists(key):
            if card.fault(store.read_bytes(key), raw):
                set_aside_file(store, key)
            elif not card.is_ours(store.get_path(key)):
                continue  # somebody wrote their own
        store.replace(key, store.write_temp(name, raw))
    return True


def _says_the_same(
    published: "Dataset", entries: Sequence["ShardEntry"], info: dict[str, Any], measured: dict[str, Any] | None
) -> bool:
    """Whether what would be written is what is published already."""
    return (
        published.fidelity == measured
        and all(published.info.get(name) == info[name] for name in (*_RESTATED, "edition"))
        and sorted(published.entries, key=_by_file) == sorted(entries, key=_by_file)
    )


def _set_index_aside(context: Context, fault: str) -> None:
    """Move both files of an index that is damaged, and say where they are."""
    from bytecache.schemas.dataset.index import DATASET, MANIFEST

    store = context.store
    keys = [key for name in (DATASET, MANIFEST) if store.exists(key := f"{TARGETS}/{name}")]
    moved = ", ".join(set_aside_file(store, key) for key in keys)
    context.say(f"convert: the published index is damaged ({fault}); it is set aside as {moved}")


def keep_settings(context: Context, *, changed: bool) -> None:
    """Keep the settings that made the published index beside it; if nothing changed, only mend them."""
    from bytecache.schemas.dataset.index import DATASET

    index = context.store.sha256(f"{TARGETS}/{DATASET}")
    context.save_config(f"{TARGETS}/config.toml", changed=changed, published=True, of=index)


def _was_cut_off(store: Store, manifest: bytes) -> bool:
    """Whether a kill between the two files of an index left the new manifest beside a dataset.json of the one before.

    `manifest`: what is to be published.
    """
    from bytecache.schemas import strict_json
    from bytecache.schemas.dataset.index import DATASET, MANIFEST, seal

    raw = {name: store.read_bytes(key) for name in (DATASET, MANIFEST) if store.exists(key := f"{TARGETS}/{name}")}
    if raw.get(MANIFEST) != manifest or DATASET not in raw:
        return False
    try:
        return seal(strict_json.parse(raw[DATASET])) == raw[DATASET]
    except (ValueError, AttributeError, RecursionError):
        return False


def contradictions(
    published: "Dataset | None", shards: Sequence[Receipt], measured: dict[str, Any] | None
) -> list[str]:
    """What the published index says of the very shards of these receipts that the receipts do not say.

    No word of a damaged index counts: there `published` is None.
    """
    if published is None:
        return []
    listed = {entry.sha256: entry for entry in published.entries}
    disputed = []
    for receipt in shards:
        entry, row = listed.get(receipt.files[0].sha256), shard_entry(receipt)
        if entry is not None:
            disputed += [
                f"{entry.file}: {name} is {getattr(entry, name)} in the index, {getattr(row, name)} in its receipt"
                for name in type(row).model_fields
                if name not in ("file", "key") and getattr(row, name) != getattr(entry, name)
            ]
    same_shards = listed.keys() == {receipt.files[0].sha256 for receipt in shards}
    if same_shards and published.fidelity != measured:
        disputed.append("the certificate of fidelity")
    return disputed


def _clear_unlisted(context: Context, files: set[str], keys: set[str]) -> None:
    """Set aside what an index that lists `files` and is made from receipts `keys` would not know.

    Shards of a conversion with other settings that was never published, or whatever somebody put there: an index must
    list all of its folder.
    """
    store = context.store
    moved = []
    for key in list(store.list(TARGETS)):
        if key.endswith(".zarr.zip") and Path(key).name not in files:
            moved.append(set_aside_file(store, key))
    for _, key in list(receipts.list_receipts(store, "convert")):
        if key not in keys:
            moved.append(set_aside_file(store, receipts.receipt_path("convert", key)))
    if moved:
        context.say(f"convert: {len(moved)} files that the data set does not list are set aside ({moved[0]}, ...)")


def mend_card(context: Context) -> bool:
    """Make the card of the published data set again if it is missing or damaged, not if somebody wrote their own."""
    from bytecache.schemas import strict_json
    from bytecache.schemas.dataset import card
    from bytecache.schemas.dataset.index import DATASET

    store, key = context.store, f"{TARGETS}/{card.FILE}"
    rendered = card.render(strict_json.parse(store.read_bytes(f"{TARGETS}/{DATASET}")))
    present = store.read_bytes(key) if store.exists(key) else None
    if present is not None and not card.fault(present, rendered):
        return False
    if present is not None:
        context.say(f"convert: {key} was damaged and is made again; the old one is {set_aside_file(store, key)}")
    else:
        context.say(f"convert: {key} was missing and is made again")
    store.replace(key, store.write_temp(card.FILE, rendered))
    return True


def _by_file(entry: Any) -> str:
    return str(entry.file)
