"""Sottovoce among the parts of a real deployment, from Debian, PyPI and npm.

Proxies, a browser, a pooler, an older PostgreSQL. `make parts` installs them, as root; `make
test-deployment` runs these tests, and so does `make test-paths`. `make test` does not enter this
folder. A part that is missing here is an error, never a skip: see `parts.py`.
"""
