"""What is on the wire, and nothing else.

The one place where the shapes of WIRE.md exist in code: server, load tests and benchmarks
import them from here. Pure: no I/O, no clock, no Trio.
"""
