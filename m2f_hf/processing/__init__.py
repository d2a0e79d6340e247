"""Pictures in, segments out: image and video processors, the image reader, label maps, run lengths, post-processing."""
