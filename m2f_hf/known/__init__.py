"""Facts about data sets and checkpoints: label sets, training recipes, stock checkpoints, lookup of files."""
