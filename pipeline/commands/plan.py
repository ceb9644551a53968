"""`plan`: the corpus cut into slices, the units of all later work."""

from bytecache.pipeline.context import Context
from bytecache.pipeline.plan import make as planning
from bytecache.pipeline.plan.index import Plan
from bytecache.pipeline.units.progress import human_bytes


def plan(context: Context) -> tuple[Plan, bool]:
    """Cut the corpus into slices; returns the plan and whether it is new."""
    context.store.sweep()
    made, new = planning.make_plan(context.store, context.settings, context.stop)
    context.save_config("plan/config.toml", changed=new)
    corpus = made.corpus
    skipped = f", {corpus['n_empty_skipped']} empty ones skipped" if corpus["n_empty_skipped"] else ""
    context.say(
        f"plan: {'new' if new else 'unchanged'}, {corpus['n_documents']} documents{skipped}, "
        f"{human_bytes(corpus['n_bytes'])} of text in {len(made.sizes)} units "
        f"({made.n_heldout} held out)"
    )
    return made, new
