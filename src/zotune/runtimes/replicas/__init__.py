"""Many runtimes as one: lock-step replicas on a Ray cluster that exchange keys and scalars only."""
