"""Which database a command is about."""

import os
from pathlib import Path
from typing import Any

from server.cli.output import refuse
from server.cli.ready import NotRunning, read_ready
from server.settings import SettingsError, load_settings

# A database is migrated, and restored, where there may be nothing else to configure.
_NOT_NEEDED = {
    "UPSTASH_REDIS_URL": "redis://unused",
    "NEXT_PUBLIC_CLERK_PUBLISHABLE_KEY": "pk_test_dW51c2VkJA==",  # unused$
}


def which_database(data_dir: Path | None) -> str | dict[str, Any]:
    """That of the `sottovoce dev` that runs in a folder, or of DB_HOST, DB_USER and the like; as
    libpq's string or its keywords. Ends the command where there is none."""
    try:
        if data_dir is not None:
            return read_ready(data_dir).database_url
        names = ("DB_", "SOTTOVOCE_DB_")
        chosen = {name: value for name, value in os.environ.items() if name.startswith(names)}
        return load_settings(chosen | _NOT_NEEDED).database_conninfo
    except SettingsError as error:
        refuse(error.findings)
    except NotRunning as error:
        refuse([str(error)])
