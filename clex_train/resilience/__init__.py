"""Stop requests, watchdog and loss spikes of a run."""
