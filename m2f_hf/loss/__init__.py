"""What is learned: matching of queries to targets, and the losses of the matched masks at sampled points."""
