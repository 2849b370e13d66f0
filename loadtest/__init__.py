"""Locust suites. Imports protocol only, and meets the server as any client does."""
