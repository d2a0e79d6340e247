"""Pictures of segments, and of predictions next to targets."""
