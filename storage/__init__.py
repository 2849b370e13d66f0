"""Redis first, PostgreSQL behind it."""
