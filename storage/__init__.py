"""Redis first, PostgreSQL behind it.

trio-asyncio replaces asyncio's `get_running_loop`; a driver that was imported before it keeps
the old one and fails at its first call. So it comes first, for everything under `storage`.
"""

import trio_asyncio as trio_asyncio
