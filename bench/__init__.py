"""Capacity planning and side-by-side runs.

Starts the server as a subprocess; imports protocol only.
"""
