"""The applications that the peers run, each as its server's own documentation has it."""
