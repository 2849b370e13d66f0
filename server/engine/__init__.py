"""The processes that serve: one supervisor, its workers, one listening socket for all of them."""
