"""Generated scenes and clips, whose annotations are known exactly."""
