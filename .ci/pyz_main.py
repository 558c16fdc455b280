"""The start of the single file: chooses the folder that shiv unpacks into, then runs shiv.

That is SHIV_ROOT, else ~/.shiv, else a private folder among the temporary ones: a home may be
read-only, missing or unknown.
"""

import os
import stat
import sys
import tempfile
from pathlib import Path

import _bootstrap


def can_unpack_into(folder: Path) -> bool:
    """Whether this process can write there; tried, since root passes every check of permissions."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # neither HOME nor an entry in /etc/passwd
        return Path("/nonexistent")


def private_folder() -> Path:
    """A temporary folder that no other user can write: code is loaded from it."""
    folder = Path(tempfile.gettempdir(), f"ai-service-pyz-{os.geteuid()}")
    if can_unpack_into(folder):
        found = folder.lstat()
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if is_ours and not found.st_mode & 0o077:
            return folder
    sys.exit(f"ai-service: cannot unpack into {folder}: set SHIV_ROOT to a directory of this user")


if not os.environ.get("SHIV_ROOT") and not can_unpack_into(home() / ".shiv"):
    os.environ["SHIV_ROOT"] = str(private_folder())
_bootstrap.bootstrap()
