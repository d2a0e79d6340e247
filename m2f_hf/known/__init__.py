"""Facts about data sets and checkpoints: label sets, training recipes, stock checkpoints, bundled files, lookup."""
