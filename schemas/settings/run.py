"""Where a run lives, the text that it cuts into units, and the workers that share them."""

from typing import Literal

from pydantic import Field

from bytecache.schemas.secrets import SecretAddress, SecretHeader
from bytecache.schemas.settings.section import Section


class Run(Section):
    """Where a run lives, and the seed of everything random in it."""

    dir: str = "runs/default"
    """Folder that every stage reads from and writes to, or s3://bucket/prefix, gs://..., az://... (hf://: reading)."""
    scratch: str = ""
    """Local folder for copies and temporary files of a remote run.dir; empty = `runs` in the cache folder."""
    seed: int = Field(0, ge=0)
    """Seed of everything random: held-out split, student initialisation, data order."""


class Corpus(Section):
    """The text and how it is cut into units of work."""

    source: str = "builtin:pydoc-topics"
    """A .jsonl[.gz|.zst], .parquet, .arrow, .txt file, a folder of these or of `datasets.save_to_disk`, a data set of
    the hub, `hf://datasets/OWNER/NAME[@REVISION][/CONFIG[/SPLIT]]`, or `builtin:pydoc-topics` (a manual)."""
    kind: Literal["text", "chat", "completion"] = "text"
    """`text`: whole documents. `chat`: `messages`, or prompt and response, of which the assistant's words are learned,
    rendered by the teacher's and the student's own chat template. `completion`: prompt and response, joined as text."""
    text_field: str = "text"
    """Name of the text column in JSONL and Parquet sources."""
    ignore_fields: str = ""
    """Names of fields of `chat` and `completion` records that are no part of what is read or said, separated by spaces;
    any other field that is not used is refused."""
    text_split: Literal["file", "paragraphs"] = "file"
    """How a .txt file becomes documents: the whole file, or runs of paragraphs of about 4 kB."""
    max_bytes: int = Field(60_000, ge=0)
    """Use about this many bytes of text (UTF-8), whole documents, in corpus order; 0 = all."""
    unit_bytes: int = Field(25_000, ge=1_000, le=1_000_000_000)
    """Most bytes of text in one unit of teacher work, half of it the least (a longer document is a unit alone), and
    what a kill can lose: minutes of a CPU; 1-4 MB on a GPU."""
    jobs: int = Field(0, ge=0)
    """Processes of this machine that plan the corpus, each with files or lines of its own; 0 = one a core."""
    license: str = ""
    """Licence of the text, for those you share the targets with; copied into dataset.json."""
    attribution: str = ""
    """Whom to credit for the text; copied into dataset.json."""
    heldout_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of documents kept from training, chosen by a hash of their text."""


class Fleet(Section):
    """How many workers share a plan, and how they meet preemption."""

    heartbeat_s: float = Field(20.0, gt=0)
    """Seconds between heartbeats of a worker (one small write each)."""
    lease_s: float = Field(120.0, gt=0)
    """Seconds without a heartbeat after which others take over a worker's unit; several heartbeats long."""
    stall_s: float = Field(1800.0, gt=0)
    """A worker whose engine has shown no progress for so many seconds stops its heartbeat."""
    max_failures: int = Field(3, ge=0)
    """Set a unit aside after so many attempts that failed; 0 = never."""
    max_losses: int = Field(8, ge=0)
    """Set a unit aside after so many workers died at it without a word; 0 = never."""
    idle_exit_s: float = Field(0.0, ge=0)
    """Leave after so many seconds with nothing to do but wait for others' units; 0 = stay to the end."""
    notice_s: float = Field(25.0, ge=0)
    """Seconds from SIGTERM or a notice to the kill: a unit that cannot finish within is given back at once."""
    notice_file: str = ""
    """A file whose appearance is a notice of preemption; empty = none."""
    notice_url: SecretAddress = SecretAddress()
    """A metadata address to poll for a notice of preemption; empty = none. See `pipeline/fleet/preemption.py`."""
    notice_header: SecretHeader = SecretHeader()
    """Header for notice_url, e.g. `Metadata-Flavor: Google`. Any other value may be a token, is written nowhere, and is
    best given as $BYTECACHE_FLEET_NOTICE_HEADER."""
    notice_token_url: SecretAddress = SecretAddress()
    """Where to PUT for a token first (AWS IMDSv2); empty = none."""
    notice_match: str = "."
    """Regular expression that the answer of notice_url must contain to be a notice; an error status never is."""
    notice_poll_s: float = Field(5.0, gt=0)
    """Seconds between looks at notice_file and notice_url."""
