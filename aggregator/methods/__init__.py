"""One file per method: plan, aggregate, publish (numpy only)."""
