"""What a device can do, and what work costs there."""
