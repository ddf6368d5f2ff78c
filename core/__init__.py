"""What every stage shares: the runtime (ranks and devices), artifacts on disk, and the command line."""
