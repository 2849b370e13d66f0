"""A campaign of faults: real servers under load, everything below them broken on purpose, and a
ledger that proves afterwards what became of each message. `make faults` runs it."""
