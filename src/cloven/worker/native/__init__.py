"""The worker's loop over a lane, compiled where there is a compiler."""
