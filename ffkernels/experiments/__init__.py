"""Training runs on real data: what the command line calls, and nothing that the library needs."""
