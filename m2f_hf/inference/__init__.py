"""One call from a picture or clip to its segments: pipeline, tracking, test-time augmentation."""
