"""What each endpoint does: one file each, a function from a request to a response."""
