"""Where things lie: the repository, golden files, and fixtures that are no part of it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
GOLDEN_FILES = ROOT / "tests" / "schemas" / "data"
"""Golden files of the formats."""
FIXTURES = ROOT.parent / "shared" / "fixtures"
"""Real tokenizers and corpora that may lie beside a checkout; where they are missing, tests that want them say so."""
