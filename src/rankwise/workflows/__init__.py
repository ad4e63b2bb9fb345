"""One file a job: plan, train, demo; configuration and data."""
