"""What happens when a step goes wrong, and how a run says why it ended."""
