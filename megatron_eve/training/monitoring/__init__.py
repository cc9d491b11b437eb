"""What a run reports: losses, speed, memory, where its weights came from."""
