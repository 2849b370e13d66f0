"""Open streams: who listens to what, what each has been given, and how it ends."""
