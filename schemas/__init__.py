"""File formats and settings: the contracts between stages and with strangers. Imports nothing of ours."""

from pathlib import Path

from bytecache.schemas.compiled_cache import settle_cache

settle_cache(Path(__file__).parent)
