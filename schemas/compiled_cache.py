"""Where compiled loops are kept when the installation cannot be written.

numba keeps them beside the source, or in the user's home; in a container that runs as somebody else neither can be
written, and it then refuses to load a function at all. What it keeps is read back as a pickle, so a folder is used only
where nobody else can write.
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

from bytecache.schemas.files import cache_folder

VARIABLE = "NUMBA_CACHE_DIR"


def settle_cache(package: Path) -> None:
    """Name a folder to numba, and to the processes that are started from here, where it would find none.

    `package`: the folder of the source. Nothing is done where numba has a place, or where there is none at all.
    """
    if os.environ.get(VARIABLE) or _can_write(package / "__pycache__"):
        return
    for folder in (cache_folder() / "loops", Path(tempfile.gettempdir()) / f"bytecache-loops-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            seen = folder.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid() and not seen.st_mode & 0o022:
            os.environ[VARIABLE] = str(folder)
            if "numba" in sys.modules:
                sys.modules["numba"].config.CACHE_DIR = str(folder)
            return


def _can_write(folder: Path) -> bool:
    """Whether files can be made in it, or it can be made."""
    return os.access(folder if folder.is_dir() else folder.parent, os.W_OK | os.X_OK)
