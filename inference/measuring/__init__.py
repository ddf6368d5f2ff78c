"""What the steering evaluation generates, reads and reports."""
