"""PostgreSQL, the system of record: connections, statements by name, migrations."""
