"""What every command works with: resolved settings, the run folder, the stop flag, and where results are said."""

from collections.abc import Callable
from dataclasses import dataclass, field

from bytecache.pipeline.config import RESOLVED_FILE, render_published, render_template
from bytecache.pipeline.stores import Store, open_store
from bytecache.pipeline.units.runner import StopFlag
from bytecache.schemas.settings import Settings


@dataclass
class Context:
    """`say` takes one line for the user; results go to stdout, progress and warnings to stderr."""

    settings: Settings
    store: Store
    stop: StopFlag = field(default_factory=StopFlag)
    say: Callable[[str], None] = print

    def save_config(self, key: str, *, changed: bool = True, published: bool = False) -> None:
        """Keep the resolved configuration at `key`, beside the output it made; skipped if nothing was made.

        `published`: what lies there is for strangers, who get the settings that decided it and no path.
        """
        if changed or not self.store.exists(key):
            self.store.replace_text(key, (render_published if published else render_template)(self.settings))
            self.store.replace_text(RESOLVED_FILE, render_template(self.settings))


def open_context(settings: Settings, say: Callable[[str], None] = print) -> Context:
    """A context on the run folder of the settings."""
    return Context(settings, open_store(settings.run.dir, settings.run.scratch), say=say)
