"""Bad steps, and the exit reason that a run writes."""
