"""What every command works with: resolved settings, the run folder, the stop flag, and where results are said."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bytecache.pipeline.config import RESOLVED_FILE
from bytecache.pipeline.config_text import render_published, render_template
from bytecache.pipeline.stores import Store, open_store
from bytecache.pipeline.units import documents
from bytecache.pipeline.units.runner import StopFlag
from bytecache.schemas.settings import Settings


@dataclass
class Context:
    """`say` takes one line for the user; results go to stdout, progress and warnings to stderr."""

    settings: Settings
    store: Store
    stop: StopFlag = field(default_factory=StopFlag)
    say: Callable[[str], None] = print

    def save_config(self, key: str, *, changed: bool = True, published: bool = False, of: str = "") -> None:
        """Keep the resolved configuration at `key`, beside the output it made; if nothing was made, only mend it.

        `published`: what lies there is for strangers, who get the settings that decided it and no path. `of`: names
        what it made. Where `key` is of something else, a command that made this was killed before it came here.
        """
        before = documents.work_of(self.store, key)
        changed = changed or bool(of and before is not None and of != before)
        resolved = render_template(self.settings, whole=True)
        # The one that says what it is of comes last: once it is there, so is the other.
        for place, text, work in (
            (RESOLVED_FILE, resolved, ""),
            (key, render_published(self.settings) if published else resolved, of),
        ):
            if changed or not documents.is_whole(self.store, place):
                if not changed and documents.was_written(self.store, place):
                    self.say(f"{place} was missing or altered and is written again, from the settings in use")
                documents.write_document(self.store, place, text, work)


def open_context(settings: Settings, say: Callable[[str], None] = print) -> Context:
    """A context on the run folder of the settings."""
    return Context(
        settings,
        open_store(settings.run.dir, settings.run.scratch, private_redirects=settings.dataset.private_redirects),
        say=say,
    )


def own_configuration(store: Store) -> Path | None:
    """A local copy of the configuration that a run was made with: its own, or where that is damaged a stage's."""
    keys = [RESOLVED_FILE, *(f"{stage}/{RESOLVED_FILE}" for stage in ("report", "teacher", "plan"))]
    whole = next((key for key in keys if documents.is_whole(store, key)), None)
    if whole is None and store.exists(RESOLVED_FILE) and not documents.was_written(store, RESOLVED_FILE):
        whole = RESOLVED_FILE  # written by hand, or by software that kept no receipt of it
    return store.get_path(whole) if whole else None


def configuration_fault(store: Store) -> str:
    """Why the configuration in a run is not to be read; "" where it may be, or where no command of ours wrote it.

    Every command takes its settings from there: one altered digit would be another run.
    """
    if not store.exists(RESOLVED_FILE) or not documents.was_written(store, RESOLVED_FILE):
        return ""
    if documents.is_whole(store, RESOLVED_FILE):
        return ""
    return (
        "is not as it was written: damaged, or edited; run `bytecache verify --repair` to set it right, or go on with "
        "--fresh (settings are changed with --set or in pipeline.toml, not there)"
    )
