"""Where jobs run: in this process, in a pool of processes, or on a Ray cluster. Jobs are paths and numbers, never secrets."""
